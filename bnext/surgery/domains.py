"""Domains of a trained model: one more, one less, two as one, or one alone without a name.

    add_domain(model, "night", like="day")       # then recompute_population_statistics(model, images, domain="night")
    merge_domains(model, ["day", "dusk"], into="light")
    select_domain(model, "night")                # plain norms, with the outputs of use_domain("night")

The norms stay the modules that they are, and what is not spoken of stays the same tensors. Which norms have domains in
the first place is the work of `convert_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError, Refusal, check_choice, list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.forms import AFFINE, POPULATION, NormForm, find_form, find_leftovers
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.norm_state import average_affines, merge_populations
from bnext.layers.sources import is_per_domain
from bnext.layers.walk import check_is_whole, find_bnext_norms
from bnext.surgery.convert import convert_norm
from bnext.surgery.convert_state import Change, ConversionReport
from bnext.text import suggest

__all__ = ["Form", "add_domain", "drop_domain", "find_domain_norms", "list_domains", "merge_domains", "select_domain"]

Form = Literal["bnext", "torch"]

NO_DOMAINS = Refusal(
    ConfigError,
    "model",
    "have norms with domains",
    "Give it some: convert_norm(model, {{'': NormSpec(population='per_domain', domains=('day',))}}), with the name of "
    "what it was trained on; in a config POPULATION of a place of MODEL.BNEXT, 'per_domain', and "
    "MODEL.BNEXT.DOMAINS.NAMES.",
)
UNKNOWN = Refusal(ConfigError, "{thing}", "be one of the model's domains {names}", "{remedy}")
TAKEN = Refusal(
    ConfigError, "A new domain", "have a name of its own", "Choose another; the model has the domains {names}."
)
LAST = Refusal(
    ConfigError,
    "A domain to drop",
    "not be the last one of a norm",
    "Keep it, or take the name off with select_domain(model, {name!r}).",
)
FALLBACK = Refusal(
    ConfigError,
    "A domain to drop",
    "not be the one that images of others are taken for",
    "Choose another fallback domain first (MODEL.BNEXT.DOMAINS.FALLBACK; in code norm.spec = "
    "norm.spec.replace(fallback_domain=...)), or drop another domain.",
)
NOT_TWO = Refusal(ConfigError, "names", "be two or more different domains to merge", "Name each once.")
NO_NUMBERS = Refusal(
    ConfigError,
    "num_samples",
    "give a number above 0 for each of the domains that are merged",
    "Count the images of each, or leave it out for equal weights.",
)
NOT_EVERYWHERE = Refusal(
    ConfigError, "A domain to select", "be one of every norm with domains", "Select one that all have, or add it first."
)
NOT_TORCH = Refusal(
    ConfigError,
    "A norm that becomes torch's",
    "be in a module, get a single feature map and hold nothing but its state",
    "Use form='bnext', whose norms give the same outputs.",
)
WRAPPED = Refusal(
    ConfigError,
    "model",
    "not be in DistributedDataParallel, which would not exchange the gradients of other parameters",
    "Call {function} before it is wrapped.",
)

COPIED = "domain {name!r} begins with the state of {source!r}"
MIXED = "domain {name!r} begins with the mixture of {sources}: population statistics merged with equal weights{affine}"
MEAN = ", affine the mean"
DROPPED = "domain {name!r} and what it owned were left out"
MERGED = "domains {sources} became {name!r}: population statistics merged with {weights}{affine}"
SELECTED = "the state of domain {name!r} is the norm's own now; that of {others} was left out"


def find_domain_norms(model: nn.Module) -> dict[str, BatchNorm2d]:
    """Path -> norm, of those that have domains."""
    return {path: norm for path, norm in find_bnext_norms(model).items() if norm.spec.domains}


def list_domains(model: nn.Module) -> tuple[str, ...]:
    """Names of the domains of a model's norms, each once.

    Example:
        >>> from bnext.layers import NormSpec
        >>> list_domains(BatchNorm2d(8, NormSpec(population="per_domain", domains=("day", "night"))))
        ('day', 'night')
    """
    names: dict[str, None] = {}
    for norm in find_domain_norms(model).values():
        names |= dict.fromkeys(norm.spec.domains)
    return tuple(names)


def add_domain(model: nn.Module, name: str, like: str | None = None) -> ConversionReport:
    """Give every norm with domains one more. In place.

        mean = sum mean_d / D,   var = sum (var_d + (mean_d - mean)^2) / D      where no `like` is named

    Args:
        model: any, whose norms are of bnext where they have domains.
        name: of the new domain.
        like: domain whose state it begins with; None: the mixture of all D domains, and the mean of their affines.

    Returns:
        The norms that have it, and what it begins with. Outputs of the other domains are what they were.

    Raises:
        ConfigError: no norm has domains, a name that is there already or cannot be a module's, an unknown `like`, or a
            model that is sharded or in DistributedDataParallel. The model is then as it was.

    Note:
        What the other domains own stays the same tensors. An optimizer does not know the new affine, if there is one:
        give it to `optimizer.add_param_group`. Statistics of the domain come from
        `recompute_population_statistics(model, images, domain=name)`.

    Example:
        >>> from bnext.layers import NormSpec
        >>> model = nn.Sequential(BatchNorm2d(8, NormSpec(population="per_domain", domains=("day", "night"))))
        >>> print(add_domain(model, "fog", like="night"))
        Domain 'fog' added to 1 norms:
          1 norm (0): domain 'fog' begins with the state of 'night'
        >>> list_domains(model)
        ('day', 'night', 'fog')
    """
    norms = _find_norms(model, "add_domain")
    names = list_domains(model)
    if name in names:
        raise TAKEN.of(repr(name), "add_domain", names=names)
    if like is not None:
        _check_known("like", like, names, "add_domain")
        norms = _select(norms, like)
    _check_names(norms, (), name)

    changes = []
    for path, norm in norms.items():
        domains = norm.spec.domains
        mixture = _merge_states(norm, domains) if like is None else []
        sources = {domain: domain for domain in domains} | {name: like or domains[0]}
        norm.set_domains(sources, norm.spec.fallback_domain)
        _write_states(norm, name, mixture)

        text = COPIED.format(name=name, source=like)
        if like is None:
            text = MIXED.format(name=name, sources=_join(domains), affine=_tell_mean(norm))
        changes.append(Change(path, text))

    return ConversionReport(changes, f"Domain {name!r} added to {len(norms)} norms")


def drop_domain(model: nn.Module, name: str) -> ConversionReport:
    """Take a domain, and what it owns, out of all norms. In place.

    Args:
        model: see `add_domain`.
        name: of the domain.

    Returns:
        The norms that had it. Outputs of the other domains are what they were.

    Raises:
        ConfigError: no norm has domains, or none this one; a norm would have none left, or takes it for its fallback
            domain; or the model is sharded or in DistributedDataParallel. The model is then as it was.

    Note:
        The other domains keep their tensors. An optimizer that has those of this one goes on holding them.
    """
    norms = _find_norms(model, "drop_domain")
    _check_known("A domain to drop", name, list_domains(model), "drop_domain")
    norms = _select(norms, name)
    for path, norm in norms.items():
        if len(norm.spec.domains) == 1:
            raise LAST.of(repr(name), path or "drop_domain", name=name)
        if norm.spec.fallback_domain == name:
            raise FALLBACK.of(repr(name), path or "drop_domain")

    for norm in norms.values():
        sources = {domain: domain for domain in norm.spec.domains if domain != name}
        norm.set_domains(sources, norm.spec.fallback_domain)

    text = DROPPED.format(name=name)
    return ConversionReport([Change(path, text) for path in norms], f"Domain {name!r} dropped from {len(norms)} norms")


def merge_domains(
    model: nn.Module, names: Sequence[str], into: str, *, num_samples: Mapping[str, float] | None = None
) -> ConversionReport:
    """Make one domain of several in every norm that has them. In place.

        mean = sum n_d mean_d / n,   var = sum n_d (var_d + (mean_d - mean)^2) / n

    Args:
        model: see `add_domain`.
        names: of two or more domains.
        into: name of the merged domain: one of them, or a new one.
        num_samples: name -> images n_d of which its statistics are; None: all count alike.

    Returns:
        What was merged. Outputs of the other domains are what they were, those of the merged ones are not.

    Raises:
        ConfigError: no norm has domains; fewer than two, or unknown, names; a name `into` that another domain has;
            numbers that are none; or the model is sharded or in DistributedDataParallel. The model is then as it was.

    Note:
        Affines, if they are per domain, are averaged, which is right for none of them: train on. The fallback domain,
        if it is one of them, is the merged one. A variance of correction 1 is taken for one of correction 0.
    """
    norms = _find_norms(model, "merge_domains")
    known = list_domains(model)
    are_names = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
    if not are_names or len(set(names)) < max(2, len(names)):
        raise NOT_TWO.of(repr(names), "merge_domains")
    for name in names:
        _check_known("A domain to merge", name, known, "merge_domains")
    if into in known and into not in names:
        raise TAKEN.of(repr(into), "merge_domains", names=known)
    _check_numbers(names, num_samples)
    for path, norm in norms.items():
        for name in names:
            _check_known("A domain to merge", name, norm.spec.domains, path or "merge_domains")
    _check_names(norms, names, into)

    weights = "equal weights" if num_samples is None else "weights by their images"
    changes = []
    for path, norm in norms.items():
        merged = _merge_states(norm, names, num_samples)
        fallback = into if norm.spec.fallback_domain in names else norm.spec.fallback_domain
        norm.set_domains(_place_merged(norm.spec.domains, names, into), fallback)
        _write_states(norm, into, merged)

        text = MERGED.format(sources=_join(names), name=into, weights=weights, affine=_tell_mean(norm))
        changes.append(Change(path, text, keeps_outputs=False))

    return ConversionReport(changes, f"Domains merged in {len(norms)} norms")


def select_domain(model: nn.Module, name: str, form: Form = "bnext") -> ConversionReport:
    """Keep one domain, without its name: the norms of a plain model, with the outputs of `use_domain(name)`. In place.

    Args:
        model: see `add_domain`.
        name: of the domain.
        form: "bnext": the norms stay bnext's, with all other answers of their specs; "torch": those that had domains
            become nn.BatchNorm2d, or nn.SyncBatchNorm where several workers share a mini-batch.

    Returns:
        What was left out; `keeps_outputs` says whether outputs in evaluation mode are equal, which only "torch" can
        change: it normalizes by population statistics at inference.

    Raises:
        ConfigError: no norm has domains, one has not this one, or is on its own in the form "torch"; or the model is
            sharded or in DistributedDataParallel. The model is then as it was.

    Note:
        The parameters of the domain stay the same tensors in the form "bnext".

    Example:
        >>> from bnext.layers import NormSpec
        >>> model = nn.Sequential(BatchNorm2d(8, NormSpec(population="per_domain", domains=("day", "night"))))
        >>> select_domain(model, "night", form="torch").keeps_outputs
        True
        >>> model[0]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    check_choice("form", form, get_args(Form), where="select_domain")
    norms = _find_norms(model, "select_domain")
    _check_known("A domain to select", name, list_domains(model), "select_domain")
    for path, norm in norms.items():
        if name not in norm.spec.domains:
            raise NOT_EVERYWHERE.of(f"{name!r}, and {norm.spec.domains} there", path)
    for path, norm in norms.items() if form == "torch" else ():
        _check_replaceable(norm, path)

    changes = []
    for path, norm in norms.items():
        others = [domain for domain in norm.spec.domains if domain != name]
        norm.keep_domain(name)
        changes.append(Change(path, SELECTED.format(name=name, others=_join(others))))

    report = ConversionReport(changes, f"Domain {name!r} selected in {len(norms)} norms")
    if form == "torch":
        places = model.named_modules(remove_duplicate=False)  # a norm may be at several
        kept = set(norms.values())
        kinds = {path: _choose_class(norm) for path, norm in places if norm in kept}
        report.changes += convert_norm(model, kinds).changes
    return report


# ---- what is refused


def _find_norms(model: nn.Module, function: str) -> dict[str, BatchNorm2d]:
    """The norms with domains of a model that can be changed."""
    check_is_whole(model, function)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise WRAPPED.of(type(model).__name__, function, function=function)

    norms = find_domain_norms(model)
    if not norms:
        raise NO_DOMAINS.of(f"{type(model).__name__} without one", function)
    return norms


def _check_known(thing: str, name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        remedy = suggest(name, known, "Name one of them.")
        raise UNKNOWN.of(repr(name), where, thing=thing, names=tuple(known), remedy=remedy)


def _check_names(norms: Mapping[str, BatchNorm2d], left_out: Collection[str], new: str) -> None:
    """Refuse the name of a new domain before the first norm is changed."""
    for norm in norms.values():
        norm.check_domains([*(name for name in norm.spec.domains if name not in left_out), new])


def _check_numbers(names: Sequence[str], numbers: Mapping[str, float] | None) -> None:
    if numbers is None:
        return
    are_numbers = all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers.values())
    if set(numbers) != set(names) or not are_numbers:
        raise NO_NUMBERS.of(repr(dict(numbers)), f"merge_domains of {_join(names)}")


def _check_replaceable(norm: BatchNorm2d, path: str) -> None:
    refused, _ = find_leftovers(norm, cast(NormForm, find_form(norm)))
    if isinstance(norm, LevelBatchNorm2d):
        refused = "it gets several levels at once"
    if refused or not path:
        raise NOT_TORCH.of(refused or "a norm on its own", path or "select_domain")


def _select(norms: Mapping[str, BatchNorm2d], name: str) -> dict[str, BatchNorm2d]:
    return {path: norm for path, norm in norms.items() if name in norm.spec.domains}


# ---- state


def _merge_states(
    norm: BatchNorm2d, names: Sequence[str], numbers: Mapping[str, float] | None = None
) -> list[dict[str, Tensor]]:
    """Fields of each module of a domain that is the union of some."""
    weights = [numbers[name] for name in names] if numbers is not None else []

    merged = []
    for states in zip(*(norm.domain_states(name) for name in names), strict=True):
        entries = [state.state_dict() for state in states]
        fields: dict[str, Tensor] = {}
        if AFFINE[0] in entries[0]:
            fields |= average_affines([_pick(entry, AFFINE) for entry in entries])
        if POPULATION[0] in entries[0]:
            fields |= merge_populations([_pick(entry, POPULATION) for entry in entries], weights)
        merged.append(fields)
    return merged


def _pick(entry: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: entry[name] for name in names if name in entry}


@torch.no_grad()
def _write_states(norm: BatchNorm2d, name: str, values: Sequence[Mapping[str, Tensor]]) -> None:
    for state, fields in zip(norm.domain_states(name) if values else (), values, strict=True):
        for field, tensor in state.state_dict(keep_vars=True).items():
            tensor.copy_(fields[field])
        state.note_statistics()


def _place_merged(domains: Sequence[str], names: Sequence[str], into: str) -> dict[str, str]:
    """Sources of `set_domains`: the merged domain stands where the first of them stood."""
    sources: dict[str, str] = {}
    for domain in domains:
        if domain not in names:
            sources[domain] = domain
        elif into not in sources:
            sources[into] = into if into in names else domain
    return sources


def _choose_class(norm: BatchNorm2d) -> type[nn.Module]:
    return nn.BatchNorm2d if norm.spec.workers in ("one", 1) else nn.SyncBatchNorm


# ---- words


def _join(names: Sequence[str]) -> str:
    return list_few([repr(name) for name in names], most=5)


def _tell_mean(norm: BatchNorm2d) -> str:
    return MEAN if is_per_domain(norm.spec.affine) else ""

"""Bring the state of one norm into another, or a state dict into the form of a model, and say what was known.

Norms inside a model are replaced in `bnext.surgery.convert`; one layout becomes another in `bnext.layers.norm_state`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnext.errors import CheckpointError, ConfigError
from bnext.functional import Moments, merge_moments
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.forms import (
    AFFINE,
    FORWARD_OF_ITS_OWN,
    POPULATION,
    NormForm,
    TreatAs,
    find_form,
    find_forms,
    find_kind,
)
from bnext.layers.norm_state import Fields, Note, convert_state, read_norm, write_state
from bnext.layers.walk import find_bnext_norms

__all__ = [
    "Change",
    "ConversionReport",
    "check_map",
    "collect_norm_specs",
    "compare_norm_specs",
    "convert_norm_state",
    "copy_norm_state",
    "list_shared_keys",
    "restrict_map",
    "take_in_population",
]

StateDict = Mapping[str, Tensor]

ADOPTED_EPS = "eps {source} of the source was taken over as {used}, in the place of {target}"
OTHER_EPS = "eps is {target}, but was {source}; outputs change, most where the variance is small"
OTHER_INFERENCE = "in evaluation mode it was normalized by {source}, and now is by {target}; outputs change"
GROUP_AFFINE = (
    "the affine took the population statistics in: an image whose groups of channels have these statistics gets the "
    "outputs that it had, and how an image differs from them is lost; fine-tune before use"
)
ROUNDED = "state of {source} was rounded to {target}"
OTHER_STATISTICS = (
    "in training the mini-batch statistics were {stored}, the model's are {expected}; the population statistics "
    "describe the former, re-estimate them (bnext reestimate, or recompute_population_statistics)"
)
UNKNOWN_STATISTICS = (
    "the checkpoint does not say whether its mini-batch statistics were shared or {per}; "
    "taken for {expected}, as the model's are"
)
OTHER_SPEC_EPS = "eps was {stored}, the model's is {expected}; outputs change, most where the variance is small"
# For 0, which is no eps of a spec: no variance that training can tell from 0 is changed by it.
NO_EPS = 1e-30


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that was done to one norm: its path in the model, what, and whether outputs stay what they were."""

    path: str
    text: str
    keeps_outputs: bool = True


@dataclasses.dataclass
class ConversionReport:
    """Changes that a conversion made, norm by norm. `str(report)` is the text to log.

    Attributes:
        changes: what was done.
        title: first words of the text.
        left: path of each norm that was asked for and stays what it was -> why.
    """

    changes: list[Change] = dataclasses.field(default_factory=list)
    title: str = "Norm state"
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def keeps_outputs(self) -> bool:
        """Whether every norm gives in evaluation mode what it gave before, but for rounding.

        Of a state dict, which does not say how its norms normalized, as far as the state tells.
        """
        return all(change.keeps_outputs for change in self.changes)

    def __str__(self) -> str:
        paths: dict[str, list[str]] = {}
        for change in self.changes:
            paths.setdefault(change.text, []).append(change.path or "the model itself")
        for path, reason in self.left.items():
            paths.setdefault(f"left as it was: {reason}", []).append(path)

        lines = [f"{self.title}:" if paths else f"{self.title}: nothing was lost."]
        for text, places in paths.items():
            count = f"{len(places)} norms ({places[0]}, ...)" if len(places) > 1 else f"1 norm ({places[0]})"
            lines.append(f"  {count}: {text}")
        return "\n".join(lines)


# ---- a state dict for a model


def convert_norm_state(
    state_dict: StateDict, model: nn.Module, *, domain_map: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], ConversionReport]:
    """A state dict in the form that the norms of a model expect, and a report.

    The norms of bnext do the same themselves where a state dict is loaded as it is; norms of others, a `domain_map`
    and a report of all norms are for this function.

    Args:
        state_dict: of norms of any form; it is not changed.
        model: the model that will load it.
        domain_map: see `copy_norm_state`; a norm that has not the names keeps to its own.

    Returns:
        A new state dict, and the report of what was converted.

    Raises:
        CheckpointError: numbered levels whose number is not the model's, or state of no known form
            or of other channels.
        ConfigError: domain_map names what no norm has.
    """
    converted = cast(dict[str, Tensor], copy.copy(state_dict))  # with torch's versions of the modules
    report = ConversionReport(title="Norm state of the checkpoint")
    used: set[str] = set()

    for path, norm, form in find_forms(model):
        prefix = f"{path}." if path else ""
        stored = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not _needs_conversion(stored, norm, form, domain_map):
            continue
        for key in stored:
            del converted[prefix + key]

        norm_map = restrict_map(domain_map, form, _list_owners(stored))
        used |= norm_map.keys()
        state, notes = convert_state(stored, form, path, norm_map)
        converted.update({prefix + key: value for key, value in state.items()})
        report.changes += [Change(path, *note) for note in notes]

    check_map(domain_map, used)
    return converted, report


def _list_owners(stored: StateDict) -> set[str]:
    """Levels, domains and pairs that own something in the state of one norm, and the halves of pairs."""
    owners = {key.rpartition(".")[0] for key in stored} - {""}

    halves = set()
    for owner in owners:
        words = owner.split("_")
        for index in range(1, len(words)):
            halves |= {"_".join(words[:index]), "_".join(words[index:])}
    return owners | halves


def _needs_conversion(stored: StateDict, norm: nn.Module, form: NormForm, domain_map: Mapping[str, str] | None) -> bool:
    """Whether state that the checkpoint has for a norm is not in the norm's form."""
    if not stored or (not domain_map and stored.keys() == norm.state_dict().keys()):
        return False
    if isinstance(norm, BatchNorm2d):
        return True

    # Of other norms only what torch could not load is touched: that which has owners, and is of a norm.
    for key, value in stored.items():
        owner, _, field = key.rpartition(".")
        has_shape = value.dim() == 0 or tuple(value.shape) == (form.num_features,)
        if field not in AFFINE + POPULATION or "." in owner or not has_shape:
            return False
    return any("." in key for key in stored)


def list_shared_keys(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as it would be if no level or domain owned anything: names to match others with.

    What is owned is not in it, but what `convert_norm_state` makes it from.
    """
    state: dict[str, Tensor] = model.state_dict()

    for path, _, form in find_forms(model):
        prefix = f"{path}." if path else ""
        for key in form.list_keys():
            value = state.pop(prefix + key, None)
            if value is not None:
                state.setdefault(prefix + key.rpartition(".")[2], value)

    return state


# ---- specs that a checkpoint holds beside the state, as the keys of rows 1 and 3 of Table 5, or 2 and 4, are the same


def collect_norm_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> fields of its `NormSpec`, for every norm of bnext in a model."""
    return {path: dataclasses.asdict(norm.spec) for path, norm in find_bnext_norms(model).items()}


def compare_norm_specs(
    stored: Mapping[str, Mapping[str, Any]] | None, keys: Iterable[str], model: nn.Module
) -> list[Change]:
    """Differences between the mini-batch statistics of a checkpoint and those of the model that loads it.

    Args:
        stored: from `collect_norm_specs` when it was saved; None: the checkpoint does not have it.
        keys: of its state dict, as it was saved; a norm that it does not hold is passed over. Numbered levels
            are detectron2's `CycleBatchNormList`, whose statistics are always per level.
        model: loads it.
    """
    owners = {key.rpartition(".")[0] for key in keys}
    changes = []

    for path, norm in find_bnext_norms(model).items():
        if not any(owner == path or owner.startswith(f"{path}.") for owner in owners):
            continue
        before = dict((stored or {}).get(path, {}))
        if f"{path}.0" in owners and "0" not in norm.sources:
            before["statistics"] = "per_level"

        spec, per = norm.spec, "per_level" if norm.levels else "per_domain"
        statistics = before.get("statistics")
        if statistics is None and (per == "per_level" or spec.statistics != "shared"):
            changes.append(Change(path, UNKNOWN_STATISTICS.format(expected=spec.statistics, per=per)))
        elif statistics not in (None, spec.statistics):
            changes.append(Change(path, OTHER_STATISTICS.format(stored=statistics, expected=spec.statistics)))

        if before.get("eps", spec.eps) != spec.eps:
            text = OTHER_SPEC_EPS.format(stored=before["eps"], expected=spec.eps)
            changes.append(Change(path, text, keeps_outputs=False))

    return changes


# ---- one norm into another


def copy_norm_state(
    source: nn.Module,
    target: nn.Module,
    path: str = "",
    *,
    domain_map: Mapping[str, str] | None = None,
    adopt_eps: bool = False,
    treat_as: TreatAs | None = None,
) -> ConversionReport:
    """Copy the affine and the statistics of one norm into another, each of any form.

    Args:
        source: see `bnext.layers.forms`; not changed.
        target: receives the state; what the source does not know keeps its value.
        path: name of the norm, for the report.
        domain_map: name in the target -> name in the source, for levels or domains whose names differ,
            or a new one that starts from another's; "" is what all of them share, so that {"": "night"}
            makes a plain norm of one domain.
        adopt_eps: the target takes over the source's eps. False: a different eps is said in the report.
        treat_as: see `convert_norm`.

    Returns:
        What was not copied as it was; `keeps_outputs` says whether outputs in evaluation mode are equal.

    Raises:
        CheckpointError: other channels, or numbered levels whose number is not the other side's.
        ConfigError: one of the two is no norm of a known form, or domain_map names what neither has.

    Example:
        >>> report = copy_norm_state(nn.BatchNorm2d(8), BatchNorm2d(8))
        >>> report.keeps_outputs
        True
    """
    source_form, form = (_require_form(norm, path, treat_as) for norm in (source, target))
    if source_form.num_features != form.num_features:
        rule, where = f"have the {form.num_features} channels of the target", path or "copy_norm_state"
        remedy = "Copy between norms of the same place."
        raise CheckpointError.of("source", rule, got=source_form.num_features, where=where, remedy=remedy)

    check_map(domain_map, restrict_map(domain_map, form, source_form.names))
    record = read_norm(source, source_form, path)
    state, notes = write_state(record, form, path, domain_map)
    notes += _load(state, target)
    notes += _compare_inference(source_form, form)
    notes += _settle_eps(source_form, form, target, adopt_eps)
    return ConversionReport([Change(path, *note) for note in notes])


def _require_form(norm: nn.Module, path: str, treat_as: TreatAs | None) -> NormForm:
    name, form = type(norm).__name__, find_form(norm, treat_as)

    if form is not None and find_kind(norm, treat_as) is not None:
        return form
    raise ConfigError.of(
        "norms",
        "be of a known form",
        got=name if form is None else f"{name}: {FORWARD_OF_ITS_OWN.format(name=name)}",
        where=path or "copy_norm_state",
        remedy="Known are BatchNorm2d, SyncBatchNorm, frozen norms with buffers, CycleBatchNormList, GroupNorm, "
        "LayerNorm, and those of bnext.",
    )


@torch.no_grad()
def take_in_population(
    source: nn.Module, target: nn.Module, path: str = "", treat_as: TreatAs | None = None
) -> list[Change]:
    """Let the affine of a group norm do what the population of a batch norm did, as far as an affine can.

        scale = weight / sqrt(var_c + eps)
        weight' = scale * sqrt(var_g + eps'),   bias' = bias + scale * (mean_g - mean_c)

    g is the group of channel c; its moments are those of its channels, merged.

    Args:
        source: any norm; only one that population statistics normalize at inference has something to take in.
        target: a norm whose affine is a copy of the source's; only that of a group norm is changed.
        path: name of the norm, for the report.
        treat_as: see `convert_norm`.

    Returns:
        What was done, if anything.
    """
    source_form, form = find_form(source, treat_as), find_form(target, treat_as)
    if source_form is None or form is None or form.affine != "shared":
        return []
    if source_form.inference != ("population",) or form.inference[0] != "group":
        return []

    layout = dataclasses.replace(source_form, affine="none", population="shared", levels=(), domains=())
    population, _ = write_state(read_norm(source, source_form, path), layout, path)
    mean, var = (population[name].double() for name in POPULATION[:2])
    size = len(mean) // int(cast(Any, form.inference[1]))
    if size == 1 and source_form.eps == form.eps:
        return []  # each channel for itself, as before

    by_group = (value.view(-1, size).T for value in (mean, var))  # [channels of a group, groups]
    group = merge_moments(Moments(mean.new_ones(size), *by_group))
    group_mean, group_var = (value.repeat_interleave(size) for value in (group.mean, group.var))

    norm: Any = target
    scale = norm.weight.double() / (var + source_form.eps).sqrt()
    norm.weight.copy_(scale * (group_var + form.eps).sqrt())
    if norm.bias is not None:
        norm.bias.copy_(norm.bias.double() + scale * (group_mean - mean))
    return [Change(path, GROUP_AFFINE, keeps_outputs=False)]


@torch.no_grad()
def _load(state: Fields, target: nn.Module) -> list[Note]:
    """Copy in place, so that what shares the tensors sees it; what is not in `state` keeps its value."""
    entries = target.state_dict(keep_vars=True)
    rounded = set()

    for key, value in state.items():
        entry = entries[key]
        is_narrower = torch.promote_types(value.dtype, entry.dtype) != entry.dtype
        entry.copy_(value)
        if is_narrower and not torch.equal(value, value.to(entry.dtype).to(value.dtype)):
            rounded.add(ROUNDED.format(source=value.dtype, target=entry.dtype))

    return [Note(text, keeps_outputs=False) for text in sorted(rounded)]


def _compare_inference(source: NormForm, target: NormForm) -> list[Note]:
    if source.inference == target.inference:
        return []

    names = [" ".join(map(str, form.inference)) for form in (source, target)]
    return [Note(OTHER_INFERENCE.format(source=names[0], target=names[1]), keeps_outputs=False)]


def _settle_eps(source: NormForm, form: NormForm, target: nn.Module, adopt: bool) -> list[Note]:
    """Give the target the eps of the source, or say that it has another."""
    if source.eps == form.eps or source.is_batch_norm != form.is_batch_norm:
        return []

    holders = [module for module in target.modules() if hasattr(module, "eps")]  # the parts of a norm too
    if not adopt or not holders:
        return [Note(OTHER_EPS.format(source=source.eps, target=form.eps), keeps_outputs=False)]

    takes_zero = not form.is_batch_norm or (form.is_frozen and not isinstance(target, BatchNorm2d))
    used = source.eps if source.eps > 0 or takes_zero else NO_EPS
    for module in holders:
        module.eps = used  # type: ignore[assignment]
    if isinstance(target, BatchNorm2d):
        target.spec = target.spec.replace(eps=used)

    return [Note(ADOPTED_EPS.format(source=source.eps, used=used, target=form.eps))]


# ---- maps of domains


def restrict_map(domain_map: Mapping[str, str] | None, form: NormForm, known: Iterable[str]) -> dict[str, str]:
    """The part of a `domain_map` that concerns one norm of this form, whose source has the `known` names."""
    names, targets = {"", *known}, {"", *form.names}
    return {target: source for target, source in (domain_map or {}).items() if source in names and target in targets}


def check_map(domain_map: Mapping[str, str] | None, used: Iterable[str]) -> None:
    """Raise ConfigError where a name has concerned no norm: a misspelt one is not passed over."""
    unused = sorted((domain_map or {}).keys() - set(used))

    if domain_map and unused:
        got = f"{unused[0]!r}: {domain_map[unused[0]]!r}, which no norm has"
        rule, remedy = "map a name in the new norms to a name in the old ones", "Correct the name, or leave it out."
        raise ConfigError.of("domain_map", rule, got=got, remedy=remedy)

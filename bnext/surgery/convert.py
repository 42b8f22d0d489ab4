"""Replace the norms of a model by norms of other answers, and carry their state over.

In three steps: which norms become what, by patterns of paths or by fields of specs; every new norm with the state of
the old one; all into their places. How state goes from one norm to another is in `bnext.surgery.convert_state`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError, Refusal
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.build import NAMED_NORMS, build_norm, make_named_norm, name_norms
from bnext.layers.cycle_batch_norm import CycleBatchNormList
from bnext.layers.forms import (
    AFFINE,
    EACH_SAMPLE_ALONE,
    NormForm,
    TreatAs,
    find_form,
    find_forms,
    find_kind,
    find_leftovers,
    find_other_norms,
)
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.layers.walk import check_is_whole, replace_modules
from bnext.surgery.convert_state import (
    Change,
    ConversionReport,
    check_map,
    copy_norm_state,
    restrict_map,
    take_in_population,
)
from bnext.text import find_near

__all__ = ["NewNorm", "convert_norm"]

NewNorm = NormSpec | str | Callable[[int], nn.Module]
Norms = list[tuple[str, nn.Module, NormForm]]

REMOVED = "the norm was removed, and its affine with it; outputs change"
OTHER_MOMENTUM = "momentum was {source}, and is {target} now"
TIED = "its {name} was shared with another module, and is its own now"
UNFROZEN = "it was frozen; now its statistics follow the mini-batches of training"
LEFT_ANSWERS = "the answers {answers} of its spec were left out"

MODEL_IS_A_NORM = Refusal(
    ConfigError, "model", "hold its norms in modules", "Make the new norm and call copy_norm_state(old, new)."
)
NO_LEVEL_NORM = Refusal(
    ConfigError,
    "model",
    "have a level norm to convert",
    "Build it with a head of bnext (MODEL.META_ARCHITECTURE BNextRetinaNet) and load the checkpoint into it; or say "
    'which norms become what: convert_norm(model, {{"backbone": NormSpec(...)}}).',
)
NO_MATCH = Refusal(
    ConfigError, "specs", "be of paths or globs that match a norm", "Correct the pattern, or leave it out."
)
NO_FORM = Refusal(
    ConfigError,
    "specs",
    "be of norms that can be converted",
    "Leave the pattern out, or make of the norm what can be.",
)
SEVERAL_CHOICES = Refusal(
    ConfigError, "a norm at several places", "become one norm", "Use patterns that match all of its places."
)
MORE_THAN_A_NORM = Refusal(
    ConfigError,
    "a norm",
    "be nothing but a norm to be converted",
    "Take it apart into a norm and the rest, or leave it out of the patterns.",
)
OTHER_INPUT = Refusal(
    ConfigError,
    "a norm",
    "become one that gets {features} too",
    "Give a NormSpec; per_level in a head of bnext, per_domain elsewhere.",
)
NO_NORMS = Refusal(ConfigError, "specs", "be NormSpecs, names, or classes of norms", "Give one of them.")

_ABSENT = object()
# Fields of a spec that a norm of any form has, or which the report speaks of by another name.
_CARRIED = {"population", "affine", "domains", "eps", "momentum", "average", "inference", "frozen"}
_CARRIED |= {"unseen", "fallback_domain", "source_images"}


def convert_norm(
    model: nn.Module,
    specs: Mapping[str, NewNorm] | None = None,
    *,
    domain_map: Mapping[str, str] | None = None,
    adopt_eps: bool = True,
    treat_as: TreatAs | None = None,
    **changes: object,
) -> ConversionReport:
    """Give norms of a model other answers, and carry their state over. In place.

    With `changes` alone, every level norm of the model gets them: `convert_norm(model, population="per_level")`.

    Args:
        model: from any source, of torchvision or detectron2, say.
        specs: pattern -> new norm. A pattern is the path of a module, for every norm in it (`"backbone"`; `""`
            is the model), or a glob for the paths of norms (`"*.conv1.norm"`); of several that match, the last
            holds. A new norm is a `NormSpec`; a name, "BN", "SyncBN", "FrozenBN", "GN", "LN" or "" for none;
            or what makes a norm of a number of channels, as `torch.nn.BatchNorm2d`. A GroupNorm's affine takes in what
            the population of a batch norm did, which an affine can where an image's groups have its statistics.
        domain_map: see `copy_norm_state`.
        adopt_eps: every norm keeps its eps, so that outputs stay what they were. False: the new eps.
        treat_as: class with a forward of its own -> class of torch that computes the same in evaluation mode, as
            `{MyNorm: nn.BatchNorm2d}`. The norms of torch, torchvision and detectron2 are known.
        changes: fields of `NormSpec`, for every level norm.

    Returns:
        What could be carried over and what could not, and which norms were left as they were; `keeps_outputs` says
        whether the outputs of every norm in evaluation mode are what they were.

    Raises:
        ConfigError: a pattern without a norm; an answer that is not allowed; a norm that holds or computes more
            than its state, which would be lost; a model that is itself a norm, or is sharded. The model is then as it
            was.

    Note:
        Device, type, mode and whether the affine is trained are carried over. The parameters are new ones:
        build the optimizer afterwards. A norm that only a list outside of the modules holds is not found.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> report = convert_norm(model, {"": NormSpec(workers="all")})
        >>> model[1]
        BatchNorm2d(8, workers='all')
        >>> report.keeps_outputs
        True

    Source:
        What conversions that keep only what they know have lost: pytorch/pytorch#187298,
        huggingface/pytorch-image-models#1254.
    """
    _check_arguments(model, specs, changes)
    check_is_whole(model, "convert_norm")
    forms, norms = find_forms(model, treat_as), []
    others = {path: reason for path, (_, reason) in find_other_norms(model, treat_as).items()}
    for path, norm, form in forms:
        if _normalizes_last(norm):
            others[path] = EACH_SAMPLE_ALONE
        else:
            norms.append((path, norm, form))
    if any(not path for path, *_ in norms):
        raise MODEL_IS_A_NORM.of(f"a {type(model).__name__} itself", "convert_norm")
    report = ConversionReport()
    if specs is None:
        choices = _choose_levels(model, norms, changes)
    else:
        choices = _choose_by_pattern(model, norms, specs, others)
        asked = {path: reason for path, reason in others.items() if any(_matches(path, pattern) for pattern in specs)}
        report.left = {path: f"{type(model.get_submodule(path)).__name__}: {why}" for path, why in asked.items()}
    norms = [norm for norm in norms if norm[0] in choices]

    new_norms: dict[nn.Module, nn.Module] = {}
    mapped: set[str] = set()
    for path, norm, form in norms:
        if norm in new_norms:
            continue
        refused, texts = find_leftovers(norm, form, treat_as, is_removed=choices[path] == "")
        if refused:
            raise MORE_THAN_A_NORM.of(f"{type(norm).__name__}: {refused}", path)
        new_norm = new_norms[norm] = _make_norm(norm, form, choices[path], path, treat_as)

        if not form.has_bias:
            _remove_bias(new_norm)
        new_form = find_form(new_norm, treat_as)
        if new_form is None:
            report.changes.append(Change(path, REMOVED, keeps_outputs=False))
            continue
        texts += _carry_settings(norm, form, new_norm, new_form, keeps_momentum=isinstance(choices[path], NormSpec))
        report.changes += [Change(path, text) for text in texts]

        norm_map = restrict_map(domain_map, new_form, form.names)
        mapped |= norm_map.keys()
        copied = copy_norm_state(norm, new_norm, path, domain_map=norm_map, adopt_eps=adopt_eps, treat_as=treat_as)
        report.changes += copied.changes
        report.changes += take_in_population(norm, new_norm, path, treat_as)
        _freeze_like(norm, new_norm)

    check_map(domain_map, mapped)
    report.changes += _find_ties(model, {norm: path for path, norm, _ in norms})

    replace_modules(model, new_norms)  # everything is made, so nothing stops half-way
    name_norms(model)

    report.title = f"{len(new_norms)} norms converted"
    return report


def _normalizes_last(norm: nn.Module) -> bool:
    """A LayerNorm as torch has it normalizes the last dimension: another thing than a norm of [N, C, H, W]."""
    return isinstance(norm, nn.LayerNorm) and type(norm).forward is nn.LayerNorm.forward


# ---- which norms become what


def _check_arguments(model: nn.Module, specs: object, changes: Mapping[str, object]) -> None:
    is_wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    fields = [field.name for field in dataclasses.fields(NormSpec)]
    unknown = ", ".join(sorted(changes.keys() - fields))

    are_norms = specs is None or isinstance(specs, Mapping)
    for pattern, value in specs.items() if isinstance(specs, Mapping) else ():
        are_norms &= isinstance(pattern, str) and (isinstance(value, (NormSpec, str)) or callable(value))

    unwrapped = "not be in DistributedDataParallel, which would not exchange the gradients of the new parameters"
    write = (
        "Write {'backbone': NormSpec(...)}, or a name, or what makes a norm of a number of channels; '' is the model."
    )
    both = f"patterns and {', '.join(changes)}= as well"
    for is_wrong, thing, rule, got, remedy in (
        (is_wrapped, "model", unwrapped, type(model).__name__, "Convert the model before it is wrapped."),
        (not are_norms, "specs", "map patterns to norms", repr(specs), write),
        (specs is not None and changes, "specs", "say everything that changes", both, "Put the fields into the specs."),
        (unknown, "changes", "be fields of NormSpec", unknown, f"They are {', '.join(fields)}."),
    ):
        if is_wrong:
            raise ConfigError.of(thing, rule, got=got, where="convert_norm", remedy=remedy)


def _choose_levels(model: nn.Module, norms: Norms, changes: dict[str, Any]) -> dict[str, NewNorm]:
    """Path -> new spec of every level norm."""
    choices: dict[str, NewNorm] = {}
    for path, norm, _ in norms:
        if isinstance(norm, LevelBatchNorm2d):
            choices[path] = norm.spec.replace(**changes)

    if not choices:
        raise NO_LEVEL_NORM.of(f"{type(model).__name__} without one", "convert_norm")
    return choices


def _list_holders(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:number]) for number in range(1, len(names))]


def _choose_by_pattern(
    model: nn.Module, norms: Norms, specs: Mapping[str, NewNorm], others: Mapping[str, str]
) -> dict[str, NewNorm]:
    """Path -> new norm, for the norms that a pattern matches; `others` cannot be converted: path -> why."""
    choices: dict[str, NewNorm] = {}
    paths = [path for path, *_ in norms]
    for pattern, value in specs.items():
        matches = [path for path in paths if _matches(path, pattern)]
        if not matches:
            for path in (path for path in others if _matches(path, pattern)):
                raise NO_FORM.of(f"{pattern!r}, {type(model.get_submodule(path)).__name__}: {others[path]}", path)
            got = f"{pattern!r}, which matches none of the {len(paths)} norms of {type(model).__name__}"
            candidates = dict.fromkeys(paths)  # and the modules that hold them, which are patterns, too
            for path in paths:
                candidates.update(dict.fromkeys(_list_holders(path)))
            near = find_near(pattern, candidates, cutoff=0.4) or paths[:3]
            raise NO_MATCH.of(got, f"near it are {', '.join(near)}" if near else "the model has no norm at all")
        choices.update(dict.fromkeys(matches, value))

    places: dict[nn.Module, list[str]] = {}
    for path, norm, _ in norms:
        places.setdefault(norm, []).append(path)
    for same in places.values():
        values = [choices.get(path) for path in sorted(same)]
        if any(value != values[0] for value in values):
            raise SEVERAL_CHOICES.of(f"{values} for {', '.join(sorted(same))}")
    return choices


def _matches(path: str, pattern: str) -> bool:
    return not pattern or path == pattern or path.startswith(f"{pattern}.") or fnmatch.fnmatchcase(path, pattern)


# ---- one new norm


def _make_norm(norm: nn.Module, form: NormForm, value: NewNorm, path: str, treat_as: TreatAs | None) -> nn.Module:
    """The norm that takes the place of another, not yet with its state; nn.Identity for none."""
    levels = norm.levels if isinstance(norm, LevelBatchNorm2d) else None
    spec = value if isinstance(value, NormSpec) else None
    if isinstance(value, str) and value in NAMED_NORMS:
        spec = NAMED_NORMS[value]

    if spec is not None and isinstance(norm, CycleBatchNormList):
        return CycleBatchNormList(num_features=form.num_features, levels=levels, spec=spec)
    if spec is not None and (levels is not None or not spec.has_levels):
        return build_norm(spec, levels)(form.num_features)

    if spec is not None or (levels is not None and not isinstance(norm, CycleBatchNormList)):
        features = "a single feature map" if levels is None else "several levels at once"
        raise OTHER_INPUT.of(repr(value), path, features=features)

    if isinstance(value, str):
        return make_named_norm(value, form.num_features) or nn.Identity()

    new_norm: nn.Module = value(form.num_features)  # type: ignore[operator]  # no spec: those are built above
    if find_form(new_norm, treat_as) is None:
        raise NO_NORMS.of(f"{value!r}, which makes a {type(new_norm).__name__}", path)
    return new_norm


def _remove_bias(new_norm: nn.Module) -> None:
    """A scale alone, as the norm before had it; a class with a forward of its own may need its bias, which is 0."""
    if find_kind(new_norm) is not type(new_norm):
        return

    for part in new_norm.modules():
        if part._parameters.get("bias") is not None:
            part.register_parameter("bias", None)


def _carry_settings(
    norm: nn.Module, form: NormForm, new_norm: nn.Module, new_form: NormForm, keeps_momentum: bool
) -> list[str]:
    """Device, type, mode and momentum; and texts on what is otherwise."""
    tensor = next((value for value in norm.state_dict().values() if value.is_floating_point()), None)
    if tensor is not None:
        new_norm.to(tensor.device, tensor.dtype)
    new_norm.train(norm.training)

    tracking = [part.track_running_stats for part in _list_populations(norm)]
    if tracking and not any(tracking):  # somebody holds them still
        for part in _list_populations(new_norm):
            part.track_running_stats = False

    texts = _carry_momentum(norm, new_norm, keeps_momentum)
    if form.is_frozen and not new_form.is_frozen and new_form.is_batch_norm:
        texts.append(UNFROZEN)
    if isinstance(norm, BatchNorm2d) and not isinstance(new_norm, BatchNorm2d):
        texts += _tell_answers(norm.spec, new_norm)
    return texts


def _list_populations(norm: nn.Module) -> list[_BatchNorm]:
    return [part for part in norm.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def _carry_momentum(norm: nn.Module, new_norm: nn.Module, keeps_momentum: bool) -> list[str]:
    """A spec has its own momentum; a name or a class has none. None is torch's for a cumulative average."""
    momentum, new_momentum = _find_momentum(norm), _find_momentum(new_norm)
    if new_momentum is _ABSENT or momentum is _ABSENT or new_momentum == momentum:
        return []
    if keeps_momentum or not (momentum is None or 0 < momentum <= 1):
        return [OTHER_MOMENTUM.format(source=momentum, target=new_momentum)]

    if isinstance(new_norm, BatchNorm2d):
        changes: dict[str, Any] = {"average": "cumulative"} if momentum is None else {"momentum": momentum}
        new_norm.spec = new_norm.spec.replace(**changes)
    for part in new_norm.modules():
        if hasattr(part, "momentum"):
            part.momentum = momentum
    return []


def _find_momentum(norm: nn.Module) -> Any:
    return next((part.momentum for part in norm.modules() if hasattr(part, "momentum")), _ABSENT)


def _tell_answers(spec: NormSpec, new_norm: nn.Module) -> list[str]:
    """Answers to "which batch?" that torch's norms cannot hold."""
    held = NormSpec(workers="all") if isinstance(new_norm, nn.SyncBatchNorm) else NormSpec()
    answers = []

    for name, value in dataclasses.asdict(spec).items():
        if name not in _CARRIED and value != getattr(held, name):
            answers.append(f"{name}={value!r}")

    return [LEFT_ANSWERS.format(answers=", ".join(answers))] if answers else []


def _freeze_like(norm: nn.Module, new_norm: nn.Module) -> None:
    """An affine that somebody froze stays frozen; one that its form froze is trained if the new form trains it."""
    if isinstance(norm, BatchNorm2d) and norm.spec.has_frozen_affine:
        return

    for field in AFFINE:
        old, new = ([p for name, p in part.named_parameters() if name.endswith(field)] for part in (norm, new_norm))
        for parameter in new if old and not any(parameter.requires_grad for parameter in old) else ():
            parameter.requires_grad_(False)


def _find_ties(model: nn.Module, replaced: Mapping[nn.Module, str]) -> list[Change]:
    """Parameters of the norms that are replaced which another module holds, too: they come apart."""
    holders: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[parameter] = holders.get(parameter, 0) + 1

    changes = []
    for norm, path in replaced.items():
        for name, parameter in norm.named_parameters():
            if holders[parameter] > 1:
                changes.append(Change(path, TIED.format(name=name)))
    return changes

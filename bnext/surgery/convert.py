"""Replace the norms of a model by norms of other answers, and carry their state over.

How state goes from one norm to another is in `bnext.surgery.convert_state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.build import NAMED_NORMS, build_norm, make_named_norm, name_norms
from bnext.layers.forms import AFFINE, NormForm, find_form, find_leftovers, iterate_norms
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.surgery.caffe import read_caffe_state
from bnext.surgery.convert_state import (
    Change,
    ConversionReport,
    check_map,
    convert_norm_state,
    copy_norm_state,
    restrict_map,
)
from bnext.surgery.norm_patterns import NewNorm, check_arguments, choose_norms

__all__ = [
    "Change",
    "ConversionReport",
    "NewNorm",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "read_caffe_state",
]

_ABSENT = object()
REMOVED = "the norm was removed, and its affine with it; outputs change"
OTHER_MOMENTUM = "momentum was {source}, and is {target} now"
TIED = "its {name} was shared with another module, and is its own now"
UNFROZEN = "it was frozen; now its statistics follow the mini-batches of training"
LEFT_ANSWERS = "the answers {answers} of its spec were left out"
# Fields of a spec that a norm of any form has, or which the report speaks of by another name.
_CARRIED = {"population", "affine", "domains", "fallback_domain", "eps", "momentum", "average", "inference", "frozen"}


def convert_norm(
    model: nn.Module,
    specs: Mapping[str, NewNorm] | None = None,
    *,
    domain_map: Mapping[str, str] | None = None,
    adopt_eps: bool = True,
    **changes: object,
) -> ConversionReport:
    """Give norms of a model other answers, and carry their state over. In place.

    With `changes` alone, every level norm of the model gets them: `convert_norm(model, population="per_level")`.

    Args:
        model: from any source, of torchvision or detectron2, say.
        specs: pattern -> new norm. A pattern is the path of a module, for every norm in it (`"backbone"`; `""`
            is the model), or a glob for the paths of norms (`"*.conv1.norm"`); of several that match, the last
            holds. A new norm is a `NormSpec`; a name, "BN", "SyncBN", "FrozenBN", "GN", "LN" or "" for none;
            or what makes a norm of a number of channels, as `torch.nn.BatchNorm2d`.
        domain_map: name of a domain of the new norm -> name in the old one, see `copy_norm_state`.
        adopt_eps: every norm keeps its eps, so that outputs stay what they were. False: the new eps.
        changes: fields of `NormSpec`, for every level norm.

    Returns:
        What could be carried over and what could not; `keeps_outputs` says whether the outputs of every norm in
        evaluation mode are what they were.

    Raises:
        ConfigError: a pattern without a norm; an answer that is not allowed; a norm that holds or computes more
            than its state, which would be lost; a model that is itself a norm. The model is then as it was.

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
    check_arguments(model, specs, changes)
    norms = [norm for norm in iterate_norms(model) if not _normalizes_last(norm[1])]
    if any(not path for path, *_ in norms):
        raise ConfigError(
            f"model must hold its norms in modules; got a {type(model).__name__} itself (convert_norm). "
            f"Make the new norm and call copy_norm_state(old, new)."
        )
    chosen = choose_norms(model, norms, specs, changes)
    report, made = ConversionReport(), {}
    for path, module, form in norms:
        if path in chosen and module not in made:
            made[module], notes = _replace(module, form, chosen[path], path, domain_map, adopt_eps)
            report.changes += notes
    targets = [(form.owners, find_form(made[module])) for path, module, form in norms if path in chosen]
    check_map(domain_map, [to for known, form in targets if form for to in restrict_map(domain_map, form, known)])
    report.changes += _find_ties(model, {module: path for path, module, _ in norms if path in chosen})
    for path, module, _ in norms:  # everything is made, so nothing stops half-way
        if path in chosen:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[module])
    name_norms(model)
    report.title = f"{len(made)} norms converted:"
    report.nothing = f"{len(made)} norms converted, and nothing was lost."
    return report


def _find_ties(model: nn.Module, replaced: Mapping[nn.Module, str]) -> list[Change]:
    """Parameters of the norms that are replaced which another module holds, too: they come apart."""
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module)
    return [
        Change(path, TIED.format(name=name))
        for norm, path in replaced.items()
        for name, parameter in norm.named_parameters()
        if len(holders[parameter]) > 1
    ]


def _normalizes_last(module: nn.Module) -> bool:
    """A LayerNorm as torch has it normalizes the last dimension: another thing than a norm of [N, C, H, W]."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def _replace(
    module: nn.Module, form: NormForm, value: NewNorm, path: str, domain_map: Mapping[str, str] | None, adopt_eps: bool
) -> tuple[nn.Module, list[Change]]:
    """The norm that takes the place of another, and what is to be said of it."""
    refused, texts = find_leftovers(module, form)
    if refused:
        raise ConfigError(
            f"a norm must be nothing but a norm to be converted; got {type(module).__name__}: {'; '.join(refused)} "
            f"({path}). Take it apart into a norm and the rest, or leave it out of the patterns."
        )
    made = _make_norm(module, form, value, path)
    if made is None:
        return nn.Identity(), [Change(path, REMOVED, keeps_outputs=False)]
    made_form = cast(NormForm, find_form(made))
    _place_like(module, made)
    texts += _carry_momentum(module, made, keeps_own=isinstance(value, NormSpec))
    if form.is_frozen and not made_form.is_frozen and made_form.is_batch_norm:
        texts.append(UNFROZEN)
    texts += _find_left_answers(module, made)
    own_map = restrict_map(domain_map, made_form, form.owners)
    report = copy_norm_state(module, made, path, domain_map=own_map, adopt_eps=adopt_eps)
    _freeze_like(module, made)
    return made, [*(Change(path, text) for text in texts), *report.changes]


def _make_norm(module: nn.Module, form: NormForm, value: NewNorm, path: str) -> nn.Module | None:
    spec = NAMED_NORMS.get(value) if isinstance(value, str) else value if isinstance(value, NormSpec) else None
    levels = module.levels if isinstance(module, LevelBatchNorm2d) else None
    if spec is not None and levels is None and spec.owner == "per_level":
        raise ConfigError(
            f"spec must not be per_level for a norm that gets one feature map at a time; got {spec} ({path}). "
            f"Use per_domain with names, or a head of bnext, which gives all levels to its norms at once."
        )
    if spec is not None:
        return build_norm(spec, levels)(form.num_features)
    if levels is not None:
        raise ConfigError(
            f"a level norm must become a norm of levels; got {value!r} ({path}), which takes one feature map. "
            f"Give a NormSpec, or build the head with that norm."
        )
    if isinstance(value, str):
        return make_named_norm(value, form.num_features)
    made = cast(Callable[[int], nn.Module], value)(form.num_features)
    if find_form(made) is None:
        raise ConfigError(
            f"specs must be NormSpecs, names, or classes of norms; got {value!r}, which makes a {type(made).__name__} "
            f"({path}). Give one of them."
        )
    return made


def _place_like(module: nn.Module, made: nn.Module) -> None:
    """Device, type and mode."""
    first = next((value for value in module.state_dict().values() if value.is_floating_point()), None)
    if first is not None:
        made.to(first.device, first.dtype)
    made.train(module.training)
    old, new = (
        [part for part in norm.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
        for norm in (module, made)
    )
    if old and not any(part.track_running_stats for part in old):  # somebody holds them still
        for part in new:
            part.track_running_stats = False


def _freeze_like(module: nn.Module, made: nn.Module) -> None:
    """An affine that somebody froze stays frozen; one that its form froze is trained if the new form trains it."""
    if isinstance(module, BatchNorm2d) and module.spec.has_frozen_affine:
        return
    for field in AFFINE:
        old, new = (
            [parameter for name, parameter in norm.named_parameters() if name.rpartition(".")[2] == field]
            for norm in (module, made)
        )
        if old and not any(parameter.requires_grad for parameter in old):
            for parameter in new:
                parameter.requires_grad_(False)


def _carry_momentum(module: nn.Module, made: nn.Module, keeps_own: bool) -> list[str]:
    """Momentum None is torch's for a cumulative average. A spec has its own; what a name or a class makes has not."""
    own, momentum = _find_momentum(made), _find_momentum(module)
    if own is _ABSENT or momentum is _ABSENT or own == momentum:
        return []
    if keeps_own or not (momentum is None or 0 < momentum <= 1):
        return [OTHER_MOMENTUM.format(source=momentum, target=own)]
    if isinstance(made, BatchNorm2d):
        changes: dict[str, Any] = {"average": "cumulative"} if momentum is None else {"momentum": momentum}
        made.spec = made.spec.replace(**changes)
    for part in made.modules():
        if hasattr(part, "momentum"):
            part.momentum = momentum
    return []


def _find_momentum(norm: nn.Module) -> Any:
    return next((part.momentum for part in norm.modules() if hasattr(part, "momentum")), _ABSENT)


def _find_left_answers(module: nn.Module, made: nn.Module) -> list[str]:
    """Answers to "which batch?" that torch's norms cannot hold."""
    if not isinstance(module, BatchNorm2d) or isinstance(made, BatchNorm2d):
        return []
    default = NormSpec()
    left = {
        field.name: getattr(module.spec, field.name)
        for field in dataclasses.fields(NormSpec)
        if field.name not in _CARRIED and getattr(module.spec, field.name) != getattr(default, field.name)
    }
    if isinstance(made, nn.SyncBatchNorm) and left.get("workers") == "all":
        del left["workers"]
    answers = ", ".join(f"{name}={value!r}" for name, value in left.items())
    return [LEFT_ANSWERS.format(answers=answers)] if left else []

"""The forms that a norm can have: who owns its affine and its statistics, and what normalizes at inference.

A form is read from what a module is and holds: torch's BatchNorm2d and SyncBatchNorm with their subclasses, a frozen
norm that keeps its affine in buffers, a list of numbered norms under one affine, GroupNorm and LayerNorm, and every
norm of bnext. Whether a class with a forward of its own computes what its form says cannot be read: it is known of
torch's, torchvision's, detectron2's and bnext's, `register_form` says it of others, and `treat_as` for one call. How
state goes from one form to another is in `bnext.layers.norm_state`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.build import LayerNorm2d
from bnext.layers.cycle_batch_norm import CycleBatchNormList
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.norm_form import AFFINE, POPULATION, NormForm, form_of_spec
from bnext.layers.sources import Ownership

__all__ = [
    "AFFINE",
    "POPULATION",
    "NormForm",
    "TreatAs",
    "find_form",
    "find_forms",
    "find_other_norms",
    "find_kind",
    "find_leftovers",
    "find_state_forms",
    "register_form",
]

TreatAs = Mapping[type[nn.Module], type[nn.Module]]

TORCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_TORCH_CLASSES = (*TORCH_NORMS, nn.GroupNorm, nn.LayerNorm)
_BNEXT_CLASSES = (LayerNorm2d, BatchNorm2d, LevelBatchNorm2d, CycleBatchNormList)
_REGISTERED: dict[type[nn.Module], type[nn.Module]] = {}
# Classes of detectron2 -> what each computes in evaluation mode; in training they are their own.
_DETECTRON2: dict[str, type[nn.Module] | None] = {
    "CycleBatchNormList": nn.ModuleList,
    "FrozenBatchNorm2d": None,  # as its buffers say
    "LayerNorm": LayerNorm2d,  # 0.6 has none
    "NaiveSyncBatchNorm": nn.BatchNorm2d,
}

_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_TORCH_ATTRIBUTES = {*vars(nn.SyncBatchNorm(1)), *vars(nn.GroupNorm(1, 1)), *vars(nn.LayerNorm(1))}

FORWARD_OF_ITS_OWN = (
    "its forward is its own (if it computes in evaluation mode what another norm does from the same state, say so: "
    "treat_as={{{name}: nn.BatchNorm2d}})"
)


WITH_ACTIVATION = (
    "{activation} is a part of it and would be lost (build the model with a norm and an activation of their own, or "
    "put nn.Sequential(nn.BatchNorm2d(...), norm.drop, norm.act) in its place, with the norm's state)"
)

# Norms that no form describes: why, and what to do about it.
NOT_YET = "it has no channels yet (run the model on one batch first)"
OTHER_DIMENSIONS = (
    "it takes other features than [N, C, H, W] (put a BatchNorm2d in its place, and reshape its features: [N, C] to "
    "[N, C, 1, 1], [N, C, D, H, W] to [N, C, D, H W])"
)
EACH_SAMPLE_ALONE = "it normalizes each sample alone: there is no batch to choose"


# ---- classes whose forward is known


def register_form(kind: type[nn.Module], treat_as: type[nn.Module]) -> None:
    """Vouch for a class: in evaluation mode it computes what another does from the same state.

    Args:
        kind: with a forward of its own; its subclasses are known, too, unless they have another forward.
        treat_as: a class of torch, FrozenBatchNorm2d of torchvision, or nn.ModuleList for a list of numbered norms
            under one affine, of which one is called after the other.

    Raises:
        ConfigError: `treat_as` is none of these.
    """
    _check_bases({kind: treat_as})
    _REGISTERED[kind] = treat_as


def find_kind(module: nn.Module, treat_as: TreatAs | None = None) -> type[nn.Module] | None:
    """The class whose form a module has: its own, or the one that it is treated as. None: nobody has vouched for it.

    Args:
        module: any; by the forward of its class, which it may have inherited.
        treat_as: as `register_form`, for this call.

    Raises:
        ConfigError: see `register_form`.
    """
    _check_bases(treat_as or {})
    forward: Callable[..., object] | None = getattr(type(module), "forward", None)  # of scripted modules it raises

    for kind, base in {**_find_detectron2(), **_REGISTERED, **(treat_as or {})}.items():
        if forward is kind.forward and isinstance(module, kind):
            return base

    if _has_activation(module) and _find_activation(module) == "":
        return nn.SyncBatchNorm if isinstance(module, nn.SyncBatchNorm) else nn.BatchNorm2d

    known = (*_TORCH_CLASSES, *_BNEXT_CLASSES, *_find_torchvision("ops.misc.FrozenBatchNorm2d"))
    known += _find_torchvision("models.convnext.LayerNorm2d")
    return type(module) if any(forward is kind.forward for kind in known) else None


def _has_activation(module: nn.Module) -> bool:
    """Whether it is a norm with drop-out and activation behind it in one module, as timm's BatchNormAct2d."""
    return isinstance(module, TORCH_NORMS) and {name for name, _ in module.named_children()} == {"drop", "act"}


def _find_activation(module: nn.Module) -> str:
    """The other work of such a norm, as "ReLU"; "" if there is none."""
    names = [type(child).__name__ for child in module.children() if not isinstance(child, nn.Identity)]
    return " and ".join(names)


def _find_torchvision(path: str) -> tuple[Any, ...]:
    """A class of torchvision, if somebody has imported it: a model that has it, has."""
    module, _, name = path.rpartition(".")
    return tuple(getattr(loaded, name) for loaded in [sys.modules.get(f"torchvision.{module}")] if loaded is not None)


def _find_detectron2() -> dict[type[nn.Module], type[nn.Module]]:
    """The same of detectron2: its classes, each with what it computes."""
    loaded = sys.modules.get("detectron2.layers.batch_norm")
    kinds = {name: getattr(loaded, name, None) for name in _DETECTRON2} if loaded is not None else {}
    return {kind: _DETECTRON2[name] or kind for name, kind in kinds.items() if kind is not None}


def _check_bases(treat_as: TreatAs) -> None:
    bases = (*_TORCH_CLASSES, *_find_torchvision("ops.misc.FrozenBatchNorm2d"), nn.ModuleList)
    if not isinstance(treat_as, Mapping):
        remedy = "Write {MyNorm: nn.BatchNorm2d}."
        raise ConfigError.of("treat_as", "be a dict, class to class", got=type(treat_as).__name__, remedy=remedy)
    for kind, base in treat_as.items():
        if not (isinstance(kind, type) and isinstance(base, type) and issubclass(base, bases)):
            rule = f"map classes to one of {', '.join(known.__name__ for known in bases)}"
            remedy = "Name the class whose outputs in evaluation mode are the same."
            raise ConfigError.of("treat_as", rule, got=f"{kind!r}: {base!r}", remedy=remedy)


# ---- reading a form


def find_form(module: nn.Module, treat_as: TreatAs | None = None) -> NormForm | None:
    """The form of a norm, or None for every other module."""
    kind = find_kind(module, treat_as) or type(module)
    norm: Any = module

    if isinstance(module, BatchNorm2d):
        return form_of_spec(module.spec, module.num_features, module.levels, module.eps, module.has_bias)

    if isinstance(module, nn.ModuleList):
        return _read_numbered(module)

    frozen = _read_frozen(module)  # of whatever class, and whatever it is treated as
    if frozen is not None:
        return frozen

    has_bias = getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is not None
    if issubclass(kind, TORCH_NORMS):
        inference: tuple[object, ...] = ("population",) if norm.running_mean is not None else ("mini_batch", "shared")
        affine, population = _layout(norm.weight), _layout(norm.running_mean)
        return NormForm(norm.num_features, affine, population, norm.eps, inference=inference, has_bias=has_bias)

    if issubclass(kind, nn.GroupNorm):
        inference = ("group", norm.num_groups)
        affine = _layout(norm.weight)
        return NormForm(norm.num_channels, affine, "none", norm.eps, inference=inference, has_bias=has_bias)

    if issubclass(kind, nn.LayerNorm) and len(norm.normalized_shape) == 1:
        (num_channels,), affine = norm.normalized_shape, _layout(norm.weight)
        return NormForm(num_channels, affine, "none", norm.eps, inference=("layer",), has_bias=has_bias)

    return None


def find_forms(model: nn.Module, treat_as: TreatAs | None = None) -> list[tuple[str, nn.Module, NormForm]]:
    """Every norm of a model, of any form, with its path; one at several places once for each of them.

    The parts of a norm (a domain's state, a numbered level) are no norms of their own.
    """
    norms: list[tuple[str, nn.Module, NormForm]] = []
    inside: str | None = None  # a norm, whose parts follow it directly

    for path, module in model.named_modules(remove_duplicate=False):
        if inside is not None and (not inside or path.startswith(f"{inside}.")):
            continue
        form = find_form(module, treat_as)
        if form is not None:
            inside = path
            norms.append((path, module, form))

    return norms


def find_other_norms(model: nn.Module, treat_as: TreatAs | None = None) -> dict[str, tuple[nn.Module, str]]:
    """Path -> norm, and why it has no form: those that `find_forms` passes over. One at several places comes once."""
    known = {path for path, *_ in find_forms(model, treat_as)}
    others: dict[str, tuple[nn.Module, str]] = {}

    for path, module in model.named_modules():
        reason = _explain_no_form(module)
        parts = path.split(".")
        is_part = "" in known or any(".".join(parts[:number]) in known for number in range(1, len(parts) + 1))
        if reason and not is_part:
            others[path] = (module, reason)

    return others


def _explain_no_form(module: nn.Module) -> str:
    """Why a norm has no form; "" for a module that is no norm."""
    name = type(module).__name__
    samples_alone = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, getattr(nn, "RMSNorm", nn.LayerNorm))

    if isinstance(module, _NormBase) and isinstance(module, LazyModuleMixin):
        return NOT_YET
    if isinstance(module, _BatchNorm):
        return OTHER_DIMENSIONS
    if isinstance(module, (_NormBase, *samples_alone)):
        return EACH_SAMPLE_ALONE

    statistics = [getattr(module, field, None) for field in ("running_mean", "running_var")]
    is_norm = all(isinstance(value, Tensor) for value in statistics)
    return FORWARD_OF_ITS_OWN.format(name=name) if is_norm else ""


def find_state_forms(model: nn.Module) -> list[tuple[str, nn.Module, NormForm]]:
    """`find_forms`, and norms of torch for features of other dimensions: their state is laid out alike."""
    norms = find_forms(model)

    for path, (module, _) in find_other_norms(model).items():
        norm: Any = module
        if isinstance(module, _NormBase) and not isinstance(module, LazyModuleMixin):
            affine, population = _layout(norm.weight), _layout(norm.running_mean)
            form = NormForm(norm.num_features, affine, population, norm.eps, has_bias=norm.bias is not None)
            norms.append((path, module, form))

    places = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(norms, key=lambda norm: places[norm[0]])


def _layout(value: Tensor | None) -> Ownership:
    return "none" if value is None else "shared"


def _read_numbered(module: nn.ModuleList) -> NormForm | None:
    """A list of equal norms that is itself called, and so is one norm; a list whose items are called is none."""
    is_called = type(module).forward not in (nn.ModuleList.forward, nn.Module.forward)
    if not is_called or not len(module) or not all(isinstance(child, TORCH_NORMS) for child in module):
        return None

    first, *others = [find_form(child) for child in module]
    if first is None or any(form != first for form in others):
        return None

    parameters = dict(module.named_parameters(recurse=False))
    affine: Ownership = "per_level" if first.affine == "shared" else "none"
    return dataclasses.replace(
        first,
        affine="shared" if "weight" in parameters or "bias" in parameters else affine,
        population="per_level" if first.population == "shared" else "none",
        levels=tuple(str(index) for index in range(len(module))),
    )


def _read_frozen(module: nn.Module) -> NormForm | None:
    """A norm whose affine are buffers, which have no gradient; one without `eps` adds none."""
    buffers = dict(module.named_buffers(recurse=False))
    is_frozen = set(buffers) - {"num_batches_tracked"} == _FROZEN_BUFFERS
    is_leaf = next(module.children(), None) is None
    if not is_frozen or not is_leaf or next(module.parameters(), None) is not None:
        return None

    shape = buffers["weight"].shape
    if len(shape) != 1 or any(buffers[name].shape != shape for name in _FROZEN_BUFFERS):
        return None

    return NormForm(
        num_features=shape[0],
        affine="shared",
        population="shared",
        eps=float(getattr(module, "eps", 0.0)),
        has_counter="num_batches_tracked" in buffers,
        is_frozen=True,
    )


# ---- what a form does not say


def find_leftovers(
    module: nn.Module, form: NormForm, treat_as: TreatAs | None = None, *, is_removed: bool = False
) -> tuple[str, list[str]]:
    """Things that another norm in the place of this one would lack.

    Args:
        module, form: the norm.
        treat_as: see `register_form`.
        is_removed: nothing is to stand in its place, so what it computes does not matter.

    Returns:
        Why it must not be converted, since outputs or state would be lost, or ""; and what is worth saying.
    """
    name, kind = type(module).__name__, find_kind(module, treat_as)

    has_activation = _has_activation(module)
    children = {child for child, _ in module.named_children()} - set(form.owners)
    more = set(module.state_dict()) - set(form.list_keys())
    more |= set() if has_activation else children
    refused = FORWARD_OF_ITS_OWN.format(name=name) if kind is None and not is_removed else ""
    if has_activation and _find_activation(module):
        refused = WITH_ACTIVATION.format(activation=_find_activation(module))
    if more:
        refused = f"it holds {', '.join(sorted(more))} besides a norm's state"

    left = set() if isinstance(module, (BatchNorm2d, nn.ModuleList)) else set(vars(module)) - _TORCH_ATTRIBUTES
    if getattr(module, "process_group", None) is not None:
        left.add("process_group")
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        left.add("hooks")
    if isinstance(module, TORCH_NORMS) and kind is not type(module) and not has_activation:
        left.add(f"training other than torch's ({name})")
    return refused, [f"left out: its {', '.join(sorted(left))}"] if left else []

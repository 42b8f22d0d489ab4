"""The forms that a norm can have: who owns its affine and its statistics, and what normalizes at inference.

A form is recognised by what a module is and holds, never by its class name: torch's BatchNorm2d and
SyncBatchNorm with their subclasses, a frozen norm that keeps its affine in buffers (as those of
detectron2 and torchvision), a list of numbered norms under one affine (detectron2's
`CycleBatchNormList`), GroupNorm and LayerNorm, and every norm of bnext. How state goes from one
form to another is in `bnext.layers.norm_state`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d

__all__ = ["AFFINE", "POPULATION", "NormForm", "find_form", "find_leftovers", "iterate_norms"]

AFFINE = ("weight", "bias")
POPULATION = ("running_mean", "running_var", "num_batches_tracked")
Layout = Literal["shared", "owned", "none"]
TORCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_TORCH_ATTRIBUTES = {*vars(nn.SyncBatchNorm(1)), *vars(nn.GroupNorm(1, 1)), *vars(nn.LayerNorm(1))}
_OWN_FORWARD = "{name} computes something else than its base class in evaluation mode"


@dataclasses.dataclass(frozen=True)
class NormForm:
    """How one norm lays out its state.

    Args:
        num_features: channels C.
        affine, population: on the norm itself ("shared"), one for each of `owners`, or "none".
        owners: names of what owns something: levels or domains; numbers, if `is_numbered`.
        is_numbered: the owners have numbers for names, whose meaning is their order.
        has_levels: the owners are levels, all of which the norm gets in one call.
        has_counter: num_batches_tracked is kept.
        eps: added to the variance.
        inference: what normalizes in evaluation mode; norms for which this is equal, and affine,
            population and eps as well, have equal outputs.
        is_frozen: population statistics normalize in training too.
    """

    num_features: int
    affine: Layout
    population: Layout
    eps: float
    owners: tuple[str, ...] = ()
    is_numbered: bool = False
    has_levels: bool = False
    has_counter: bool = True
    inference: tuple[object, ...] = ("population",)
    is_frozen: bool = False

    @property
    def sources(self) -> str:
        """What the owners are called in messages."""
        return "levels" if self.has_levels or self.is_numbered else "domains"

    @property
    def is_batch_norm(self) -> bool:
        """Whether it normalizes by a batch or by the population, and not each sample alone."""
        return self.inference[0] in ("population", "mini_batch")

    def list_keys(self) -> list[str]:
        """The keys of its state dict."""
        population = POPULATION if self.has_counter else POPULATION[:2]
        keys = []
        for layout, fields in ((self.affine, AFFINE), (self.population, population)):
            for owner in {"shared": ("",), "owned": self.owners, "none": ()}[layout]:
                keys += [f"{owner}.{field}" if owner else field for field in fields]
        return keys


def find_form(module: nn.Module) -> NormForm | None:
    """The form of a norm, or None for every other module."""
    if isinstance(module, BatchNorm2d):
        return _read_own(module)
    if isinstance(module, TORCH_NORMS):
        inference: tuple[object, ...] = ("population",)
        if module.running_mean is None:
            inference = ("mini_batch", "shared")
        affine, population = _layout(module.weight), _layout(module.running_mean)
        return NormForm(module.num_features, affine, population, module.eps, inference=inference)
    if isinstance(module, nn.ModuleList):
        return _read_numbered(module)
    if isinstance(module, nn.GroupNorm):
        inference = ("group", module.num_groups)
        return NormForm(module.num_channels, _layout(module.weight), "none", module.eps, inference=inference)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        inference = ("layer",)
        return NormForm(module.normalized_shape[0], _layout(module.weight), "none", module.eps, inference=inference)
    return _read_frozen(module)


def iterate_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, NormForm]]:
    """Every norm of a model with its path and form; one at several places once for each of them.

    The parts of a norm (a domain's state, a numbered level) are no norms of their own.
    """
    outer: str | None = None  # the parts of a module follow it directly
    for path, module in model.named_modules(remove_duplicate=False):
        if outer is not None and (not outer or path.startswith(f"{outer}.")):
            continue
        form = find_form(module)
        if form is not None:
            outer = path
            yield path, module, form


def find_leftovers(module: nn.Module, form: NormForm) -> tuple[list[str], list[str]]:
    """What another norm in the place of this one would lack.

    Returns:
        What forbids a conversion, since outputs or state would be lost; and what is worth saying.
    """
    refused = []
    names = {name for name, _ in module.named_children()} - set(form.owners)
    if names:
        refused.append(f"it holds the modules {', '.join(sorted(names))}")
    keys = set(module.state_dict()) - set(form.list_keys())
    if keys and not names:
        refused.append(f"it holds {', '.join(sorted(keys))} besides a norm's state")
    own_forward = _has_own_forward(module)
    if own_forward and not refused and not _acts_as_named(module, form):
        refused.append(_OWN_FORWARD.format(name=type(module).__name__))
    notes = []
    if own_forward and isinstance(module, TORCH_NORMS):
        notes.append(f"what {type(module).__name__} does otherwise than torch in training was left out")
    attributes = set() if isinstance(module, (BatchNorm2d, nn.ModuleList)) else set(vars(module)) - _TORCH_ATTRIBUTES
    if getattr(module, "process_group", None) is not None:
        attributes.add("process_group")
    if attributes:
        notes.append(f"its attributes {', '.join(sorted(attributes))} were left out")
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        notes.append("its hooks were left out")
    return refused, notes


def _layout(value: Tensor | None) -> Layout:
    return "none" if value is None else "shared"


def _read_own(module: BatchNorm2d) -> NormForm:
    spec = module.spec
    layouts: dict[str, Layout] = {"shared": "shared", "none": "none", "per_level": "owned", "per_domain": "owned"}
    inference: tuple[object, ...] = ("population",)
    if spec.inference == "mini_batch":
        inference = ("mini_batch", spec.statistics)
        inference += (module.domains,) if spec.statistics != "shared" else ()
    return NormForm(
        num_features=module.num_features,
        affine=layouts[spec.affine],
        population=layouts[spec.population],
        eps=module.eps,
        owners=tuple(module.domains),
        has_levels=isinstance(module, LevelBatchNorm2d),
        inference=inference,
        is_frozen=spec.has_frozen_statistics,
    )


def _read_numbered(module: nn.ModuleList) -> NormForm | None:
    """A list of norms that is itself called, and so is one norm; a list whose items are called is none."""
    if type(module).forward in (nn.ModuleList.forward, nn.Module.forward) or not len(module):
        return None
    forms = [find_form(child) for child in module if isinstance(child, TORCH_NORMS)]
    first = forms[0] if len(forms) == len(module) else None
    if first is None or any(form != first for form in forms):
        return None
    held = any(name in dict(module.named_parameters(recurse=False)) for name in AFFINE)
    return dataclasses.replace(
        first,
        affine="shared" if held else ("owned" if first.affine == "shared" else "none"),
        population="owned" if first.population == "shared" else "none",
        owners=tuple(str(index) for index in range(len(module))),
        is_numbered=True,
    )


def _read_frozen(module: nn.Module) -> NormForm | None:
    """A norm whose affine are buffers, which have no gradient; one without `eps` adds none."""
    buffers = dict(module.named_buffers(recurse=False))
    if set(buffers) - {"num_batches_tracked"} != _FROZEN_BUFFERS or next(module.parameters(), None) is not None:
        return None
    shape = buffers["weight"].shape
    if len(shape) != 1 or any(buffers[name].shape != shape for name in _FROZEN_BUFFERS) or list(module.children()):
        return None
    return NormForm(
        num_features=shape[0],
        affine="shared",
        population="shared",
        eps=float(getattr(module, "eps", 0.0)),
        has_counter="num_batches_tracked" in buffers,
        is_frozen=True,
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether its class computes something that neither torch nor bnext wrote."""
    if isinstance(module, nn.ModuleList):
        return False
    known = (BatchNorm2d, LevelBatchNorm2d, *TORCH_NORMS, nn.GroupNorm, nn.LayerNorm)
    return all(type(module).forward is not kind.forward for kind in known)


@torch.no_grad()
def _acts_as_named(module: nn.Module, form: NormForm) -> bool:
    """Whether its class, with random state, gives in evaluation mode what a norm of its form does.

    Random state, because under the zero weight that many residual blocks start from an activation does not show.
    """
    if isinstance(module, BatchNorm2d):
        return False  # it has domains to be called with: what a subclass of it adds cannot be seen from outside
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(form.num_features, generator=generator) + 0.5 for name in sorted(_FROZEN_BUFFERS)}
    probe = copy.copy(module)  # shares everything with the module, until it is replaced here
    for group in ("_parameters", "_buffers"):
        held = getattr(module, group)
        setattr(probe, group, {k: None if v is None else state.get(k, torch.zeros(())) for k, v in held.items()})
    probe.training = False
    features = torch.randn(2, form.num_features, 2, 2, generator=generator)
    try:
        return torch.allclose(probe.forward(features.clone()), _compute(features, form, state), rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


def _compute(features: Tensor, form: NormForm, state: dict[str, Tensor]) -> Tensor:
    """What a norm of this form gives in evaluation mode."""
    weight, bias = (state[name] if form.affine == "shared" else None for name in AFFINE)
    if form.inference[0] == "layer":
        last = F.layer_norm(features.movedim(1, -1), (form.num_features,), weight, bias, form.eps)
        return last.movedim(-1, 1)
    if form.inference[0] == "group":
        return F.group_norm(features, cast(int, form.inference[1]), weight, bias, form.eps)
    mean, var = (state[name] if form.population == "shared" else None for name in POPULATION[:2])
    return F.batch_norm(features, mean, var, weight, bias, training=mean is None, eps=form.eps)

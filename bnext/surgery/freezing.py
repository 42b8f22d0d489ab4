"""Freeze batch norms while a model trains: their population statistics, their affine, or both."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError, Refusal, check_choice, list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.forms import find_other_norms
from bnext.layers.spec import NormSpec
from bnext.layers.walk import Selection, check_is_whole, find_norms, replace_modules
from bnext.notices import tell_once

__all__ = ["NO_NORM", "Freezable", "freeze_norms", "unfreeze_norms"]

Freezable = Literal["both", "statistics", "affine"]

log = logging.getLogger(__name__)

STILL_MOVING = (
    "%d norms with statistics were not frozen: %s. Put them into evaluation mode in every training step, or a "
    "BatchNorm2d in their place."
)
NO_NORM = Refusal(
    ConfigError,
    "model",
    "have a batch norm with {kind}",
    "Choose the norm when the model is built, select others, or leave this out.",
)
WRAPPED = Refusal(
    ConfigError,
    "model",
    "not be in DistributedDataParallel when its affine is frozen or unfrozen",
    "Do it before it is wrapped, or use the hook FreezeNorms.",
)
NO_STATISTICS_TO_FREEZE = Refusal(
    ConfigError,
    "A norm to freeze statistics of",
    "have some, and be of bnext, or a plain nn.BatchNorm2d or nn.SyncBatchNorm inside of a model",
    "Leave it out with select, or convert it with convert_norm.",
)

_PARTS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "statistics": frozenset({"statistics"}),
    "affine": frozenset({"affine"}),
    "both": frozenset({"statistics", "affine"}),
}


def freeze_norms(model: nn.Module, what: Freezable = "both", select: Selection | None = None) -> tuple[str, ...]:
    """Freeze batch norms, also while the model trains: one switch for statistics and affine.

    Frozen population statistics normalize in training, too, and no longer move, whatever `model.train()` says.
    A frozen affine has no gradient. (`requires_grad=False` alone leaves the statistics moving.)

    Args:
        model: its norms may be bnext's, or torch's BatchNorm2d and SyncBatchNorm.
        what: population "statistics", "affine", or "both".
        select: called as select(path, layer) for every batch norm; those for which it is true. Default: all.

    Returns:
        Paths of the norms that were changed.

    Raises:
        ConfigError: no batch norm is selected; one of another class, or without population statistics, where they
            are to be frozen; an affine inside of `DistributedDataParallel`. The model is then as it was.

    Note:
        torch's norm with statistics to freeze is replaced, in its place, by a `BatchNorm2d` of bnext with the same
        parameters and buffers: optimizers and state dicts stay as they are. In a running training on several workers
        freeze an affine with the hook `FreezeNorms`: `DistributedDataParallel` expects the gradients of all
        parameters that had one when it was made.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> freeze_norms(model)
        ('1',)
        >>> model[1].spec.frozen, model[1].weight.requires_grad
        ('both', False)

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 4 (FrozenBN at the end of a training);
        pytorch/pytorch#86590 and lightly-ai/lightly#1438 for what goes wrong otherwise.
    """
    norms = _select(model, what, select)
    if what != "affine":
        if not all(isinstance(norm, BatchNorm2d) for norm in norms.values()):  # which are replaced
            check_is_whole(model, "freeze_norms")
        for path, norm in norms.items():
            _check_statistics(path, norm)
        _tell_moving(model, select)

    changed = []
    replacements: dict[nn.Module, BatchNorm2d] = {}
    for path, norm in norms.items():
        if (_freezable_parts(norm) & _PARTS[what]) - _frozen_parts(norm):
            changed.append(path)
        if what != "affine" and not isinstance(norm, BatchNorm2d):
            replacements[norm] = _take_over(norm, path)

    replace_modules(model, replacements)
    for norm in norms.values():
        parts = _frozen_parts(norm) | (_freezable_parts(norm) & _PARTS[what])
        _set_frozen(replacements.get(norm, norm), parts)
    return tuple(changed)


def unfreeze_norms(model: nn.Module, what: Freezable = "both", select: Selection | None = None) -> tuple[str, ...]:
    """Undo `freeze_norms`: statistics move again, and normalize as the spec says; the affine has a gradient.

    Args, Returns, Raises: as `freeze_norms`.

    Note:
        Detectron2's and torchvision's FrozenBatchNorm2d are no batch norms that could be unfrozen.
    """
    norms = _select(model, what, select)
    changed = [path for path, norm in norms.items() if _frozen_parts(norm) & _PARTS[what]]

    for norm in norms.values():
        _set_frozen(norm, _frozen_parts(norm) - _PARTS[what])
    return tuple(changed)


def _select(model: nn.Module, what: str, select: Selection | None) -> dict[str, Any]:
    check_choice("what", what, get_args(Freezable), where="freeze_norms")

    norms = find_norms(model, select)
    if what == "affine":
        norms = {path: norm for path, norm in norms.items() if "affine" in _freezable_parts(norm)}
    if not norms:
        part = "an affine" if what == "affine" else "population statistics"
        raise NO_NORM.of("none", "freeze_norms", kind=f"{part} that is selected")

    if what != "statistics" and isinstance(model, DistributedDataParallel):
        raise WRAPPED.of("one that is", "freeze_norms")
    return norms


def _tell_moving(model: nn.Module, select: Selection | None) -> None:
    """Say which norms keep statistics that go on moving in training, as they are no batch norms of torch or of ours."""
    moving = []
    for path, (norm, _) in find_other_norms(model).items():
        has_statistics = isinstance(getattr(norm, "running_mean", None), Tensor) and not isinstance(norm, _BatchNorm)
        if has_statistics and (select is None or select(path, norm)):
            moving.append(f"{path} ({type(norm).__name__})")

    if moving:
        tell_once(log, model, STILL_MOVING, len(moving), list_few(moving))


# ---- statistics of torch's norms, which bnext's take over


def _check_statistics(path: str, norm: Any) -> None:
    """Only what bnext's BatchNorm2d has, or can take over without loss."""
    obstacles = {"none": isinstance(norm, BatchNorm2d) and norm.spec.population == "none"}
    if not isinstance(norm, BatchNorm2d):
        hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
        obstacles = {
            f"a {type(norm).__name__}": type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm),
            "none": norm.running_mean is None,
            "the model itself": not path,
            "one with hooks, which would be lost": any(hooks),
            f"one with eps {norm.eps!r}": not norm.eps > 0,
            "a SyncBatchNorm with a process group of its own": getattr(norm, "process_group", None) is not None,
        }

    for obstacle, is_there in obstacles.items():
        if is_there:
            raise NO_STATISTICS_TO_FREEZE.of(obstacle, path or "model")


def _take_over(norm: Any, path: str) -> BatchNorm2d:
    """bnext's norm with the parameters and buffers of torch's: the same tensors, no copies."""
    spec = NormSpec(
        workers="all" if isinstance(norm, nn.SyncBatchNorm) else "one",
        average="moving" if norm.momentum is not None else "cumulative",
        affine="shared" if norm.affine else "none",
        eps=norm.eps,
    )
    taken = BatchNorm2d(norm.num_features, spec)
    if norm.bias is None:  # with a weight: a scale alone
        taken.register_parameter("bias", None)

    for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        setattr(taken, name, value)
    taken.momentum, taken.path = norm.momentum, path
    return taken.train(norm.training)


# ---- parts of a norm, with those of its domains


def _freezable_parts(norm: nn.Module) -> frozenset[str]:
    has_affine = next(norm.parameters(), None) is not None
    return _PARTS["both"] if has_affine else _PARTS["statistics"]


def _frozen_parts(norm: nn.Module) -> frozenset[str]:
    """The parts that are frozen now; of the affine its parameters tell."""
    parts = _PARTS[norm.spec.frozen] if isinstance(norm, BatchNorm2d) else _PARTS["none"]
    affine = list(norm.parameters())

    is_trained = not affine or any(parameter.requires_grad for parameter in affine)
    return parts - {"affine"} if is_trained else parts | {"affine"}


def _set_frozen(norm: nn.Module, parts: frozenset[str]) -> None:
    if ("affine" in parts) != ("affine" in _frozen_parts(norm)):
        for parameter in norm.parameters():
            parameter.requires_grad_("affine" not in parts)
            parameter.grad = None  # an optimizer would still make steps with an old one

    if isinstance(norm, BatchNorm2d):
        frozen = next(name for name, value in _PARTS.items() if value == parts)
        norm.spec = norm.spec.replace(frozen=frozen)

"""Freeze batch norms while a model trains: their population statistics, their affine, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError, check_choice
from bnext.layers.batch_norm import BatchNorm2d, DomainState
from bnext.layers.spec import NormSpec

__all__ = ["Freezable", "Selection", "find_batch_norms", "freeze_norms", "say_no_norm", "unfreeze_norms"]

Freezable = Literal["both", "statistics", "affine"]
Selection = Callable[[str, nn.Module], bool]

_PARTS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "statistics": frozenset({"statistics"}),
    "affine": frozenset({"affine"}),
    "both": frozenset({"statistics", "affine"}),
}


def find_batch_norms(model: nn.Module, select: Selection | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of every batch norm of a model: bnext's, torch's, and subclasses of torch's.

    Args:
        model: any module.
        select: called as select(path, layer); those for which it is true. Default: all.
    """
    for path, layer in model.named_modules():
        is_norm = isinstance(layer, _BatchNorm) and not isinstance(layer, DomainState)
        if is_norm and (select is None or select(path, layer)):
            yield path, layer


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
    norms = _find(model, what, select)
    _check_is_free(model, what)
    if what != "affine":
        for path, layer in norms:
            _check_has_statistics(path, layer)
    changed = [path for path, layer in norms if _parts_of(layer) != _parts_of(layer) | _owned(layer, what)]
    is_taken = what != "affine"
    taken = {n: _take_over(n, path) for path, n in norms if is_taken and not isinstance(n, BatchNorm2d)}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in taken:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, taken[layer])
    for _, layer in norms:
        _set_frozen(taken.get(layer, layer), _parts_of(layer) | _owned(layer, what))
    return tuple(changed)


def unfreeze_norms(model: nn.Module, what: Freezable = "both", select: Selection | None = None) -> tuple[str, ...]:
    """Undo `freeze_norms`: statistics move again, and normalize as the spec says; the affine has a gradient.

    Args, Returns, Raises: as `freeze_norms`.

    Note:
        Detectron2's and torchvision's FrozenBatchNorm2d are no batch norms that could be unfrozen.
    """
    norms = _find(model, what, select)
    _check_is_free(model, what)
    changed = [path for path, layer in norms if _parts_of(layer) & _PARTS[what]]
    for _, layer in norms:
        _set_frozen(layer, _parts_of(layer) - _PARTS[what])
    return tuple(changed)


def say_no_norm(what: str, where: str) -> ConfigError:
    """The error of a function that found no norm of its kind."""
    return ConfigError(
        f"model must have a batch norm with {what} that is selected; got none ({where}). Choose the norm when the "
        f"model is built, or leave this out."
    )


def _find(model: nn.Module, what: str, select: Selection | None) -> list[tuple[str, Any]]:
    check_choice("what", what, get_args(Freezable), where="freeze_norms")
    norms = [(path, n) for path, n in find_batch_norms(model, select) if what != "affine" or _affine_of(n)]
    if not norms:
        raise say_no_norm("an affine" if what == "affine" else "population statistics", "freeze_norms")
    return norms


def _check_is_free(model: nn.Module, what: str) -> None:
    if what != "statistics" and isinstance(model, DistributedDataParallel):
        raise ConfigError(
            "model must not be in DistributedDataParallel when its affine is frozen or unfrozen; got one that is "
            "(freeze_norms). Do it before it is wrapped, or use the hook FreezeNorms."
        )


def _check_has_statistics(path: str, layer: Any) -> None:
    if isinstance(layer, BatchNorm2d):
        has_statistics = layer.spec.population != "none"
    else:
        has_statistics = layer.running_mean is not None
        _check_is_replaceable(path, layer)
    if not has_statistics:
        raise ConfigError(
            f"A norm must have population statistics to freeze; got none ({path}). Leave it out with select."
        )


def _check_is_replaceable(path: str, layer: Any) -> None:
    """Only what bnext's BatchNorm2d can take over without loss."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    reason = ""
    if type(layer) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        reason = f"a {type(layer).__name__}"
    elif not path:
        reason = "the model itself"
    elif not layer.eps > 0:
        reason = f"one with eps {layer.eps!r}"
    elif any(hooks):
        reason = "one with hooks, which would be lost"
    elif getattr(layer, "process_group", None) is not None:
        reason = "a SyncBatchNorm with a process group of its own"
    if reason:
        raise ConfigError(
            f"A norm whose statistics are frozen must be of bnext, or a plain nn.BatchNorm2d or nn.SyncBatchNorm "
            f"inside of a model; got {reason} ({path or 'model'}). Convert it with convert_norm, or leave it out with "
            f"select."
        )


def _take_over(layer: Any, path: str) -> BatchNorm2d:
    """bnext's norm with the parameters and buffers of torch's: the same tensors, no copies."""
    spec = NormSpec(
        workers="all" if isinstance(layer, nn.SyncBatchNorm) else "one",
        average="moving" if layer.momentum is not None else "cumulative",
        affine="shared" if layer.affine else "none",
        eps=layer.eps,
    )
    norm = BatchNorm2d(layer.num_features, spec)
    for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        setattr(norm, name, value)
    norm.momentum, norm.path = layer.momentum, path
    return norm.train(layer.training)


def _affine_of(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.parameters())  # of its domains, too


def _owned(layer: Any, what: str) -> frozenset[str]:
    """What of `what` the norm has."""
    return _PARTS[what] if _affine_of(layer) else _PARTS[what] - {"affine"}


def _parts_of(layer: Any) -> frozenset[str]:
    """What is frozen in a norm now."""
    parts = _PARTS[layer.spec.frozen] if isinstance(layer, BatchNorm2d) else _PARTS["none"]
    affine = _affine_of(layer)
    return parts | {"affine"} if affine and not any(p.requires_grad for p in affine) else parts - {"affine"}


def _set_frozen(layer: Any, parts: frozenset[str]) -> None:
    if ("affine" in parts) != ("affine" in _parts_of(layer)):
        for parameter in _affine_of(layer):
            parameter.requires_grad_("affine" not in parts)
            parameter.grad = None  # an optimizer would still make steps with an old one
    if isinstance(layer, BatchNorm2d):
        frozen = next(name for name, value in _PARTS.items() if value == parts)
        layer.spec = layer.spec.replace(frozen=frozen)

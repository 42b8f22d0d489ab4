"""A model that is put into a state for a while, and back: modes, attributes, buffers, parameters, random numbers.

The one place where this is done. What a call of a norm knows besides its tensors changes nothing of a model: see
`bnext.scope.record`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnext.seeding import seeded

__all__ = ["drawing_from", "keeping_buffers", "keeping_modes", "keeping_parameters", "restoring", "setting"]

_NOTE = "_note"  # of a norm of bnext, of the buffers that it keeps while they are frozen


@contextlib.contextmanager
def restoring(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Undo at the end of this scope whatever was done to a model in it, bit by bit, also after an exception.

    Put back are the modes, the plain attributes of all modules (what they count on the way, such as the moving average
    of foreground anchors of detectron2's dense detectors, or the position of its CycleBatchNormList), which buffers
    they have, and the values of the buffers. Parameters (see `keeping_parameters`), and what lists hold, are not.

    Args:
        model: any module.
        seed: random numbers start from it, see `drawing_from`; None: they are left alone.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> with restoring(norm):
        ...     output = norm.train()(torch.randn(2, 3, 4, 4))
        >>> int(norm.num_batches_tracked)
        0
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]

    with keeping_buffers(model.modules()), contextlib.nullcontext() if seed is None else drawing_from(model, seed):
        try:
            yield
        finally:
            for module, own in attributes:
                vars(module).clear()
                vars(module).update(own)


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put the mode of every module, training or evaluation, back at the end of this scope."""
    modes = {module: module.training for module in model.modules()}

    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def keeping_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back at the end of this scope which buffers modules have, and their values, bit by bit.

    Those of a lazy module that has none yet are left as they become; the modules within a module are other ones.
    """
    before = [(module, dict(module._buffers.items())) for module in modules]
    notes = [(module, vars(module)[_NOTE]) for module, _ in before if _NOTE in vars(module)]
    buffers = [buffer for _, own in before for buffer in own.values() if buffer is not None and not is_lazy(buffer)]
    values = [(buffer, buffer.clone()) for buffer in buffers if not _is_expanded(buffer)]

    try:
        yield
    finally:
        for buffer, value in values:
            buffer.data.copy_(value)  # .data: a backward pass of the caller's may still need the buffer
        for module, own in before:
            if isinstance(module._buffers, dict):  # a scripted module has always the same ones
                moved = {name: _move_as(own[name], now) for name, now in module._buffers.items() if name in own}
                module._buffers.clear()
                module._buffers.update({**own, **moved})
        for module, note in notes:
            setattr(module, _NOTE, note)


@contextlib.contextmanager
def keeping_parameters(model: nn.Module) -> Iterator[None]:
    """Put back at the end of this scope the values of a model's parameters and their gradients, bit by bit.

    In the scope parameters begin without a gradient. Those of a lazy module that has none yet are left as they become.

    Args:
        model: any module; a second copy of its parameters is held meanwhile.
    """
    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    before = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in parameters]

    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, value, gradient in before:
            parameter.data.copy_(value)
            parameter.grad = gradient


def _move_as(buffer: Tensor | None, now: Tensor | None) -> Tensor | None:
    """The buffer; in the type and on the device of what stands there now, if the model was moved meanwhile."""
    return buffer if buffer is None or now is None or is_lazy(buffer) else buffer.to(now)


def _is_expanded(buffer: Tensor) -> bool:
    """Whether elements share memory, so that torch lets nobody write to it."""
    return any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


@contextlib.contextmanager
def setting(modules: Iterable[object], **values: object) -> Iterator[None]:
    """Let attributes of modules have other values in this scope.

    Args:
        modules: or what else has attributes; those that have not this one are passed over.
        values: attribute -> value.

    Example:
        >>> dropout = nn.Dropout()
        >>> with setting([dropout], training=False):
        ...     dropout.training
        False
    """
    before = [(module, name, getattr(module, name)) for module in modules for name in values if hasattr(module, name)]

    try:
        for module, name, _ in before:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def drawing_from(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers start from a seed in this scope, also on the model's GPUs, and then go on as without it."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}

    with torch.random.fork_rng(devices=sorted(devices), enabled=bool(devices)), seeded(seed):
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield

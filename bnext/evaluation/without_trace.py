"""Forwards beside the training, of which the model keeps nothing: scopes of a validation loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bnext.scope.statistics import frozen_statistics
from bnext.seeding import seeded

__all__ = ["as_in_training", "drawing_from", "leaving_no_trace", "restoring_attributes"]


@contextlib.contextmanager
def restoring_attributes(model: nn.Module) -> Iterator[None]:
    """Put the attributes of all modules back after this scope, their modes and what they count on the way.

    Dense detectors, for one, keep a moving average of foreground anchors that way, in no buffer. Values are put back
    as objects; what is changed in place (buffers, parameters, lists) is not.
    """
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Put buffers and attributes of a model back after this scope, bit by bit, whatever was done to them."""
    copies = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), restoring_attributes(model):
            yield
    finally:
        for buffer, value in copies:
            buffer.data.copy_(value)  # .data: a backward pass of the caller's may still need the buffer


@contextlib.contextmanager
def as_in_training(model: nn.Module, *, by_population: bool) -> Iterator[None]:
    """Training mode in this scope, but without dropout, pictures and moving statistics.

    Args:
        by_population: batch norms are as at inference.
    """
    with restoring_attributes(model), frozen_statistics(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _DropoutNd) or (by_population and isinstance(module, _BatchNorm)):
                module.training = False
            if getattr(module, "vis_period", 0):
                module.vis_period = 0
        yield


@contextlib.contextmanager
def drawing_from(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers start from a seed in this scope, also on the model's GPUs, and then go on as without it."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices), enabled=bool(devices)), seeded(seed):
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield

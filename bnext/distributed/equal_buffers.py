"""Norm buffers that are the same on every worker."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnext.distributed.collectives import all_gather_objects
from bnext.distributed.groups import resolve_group
from bnext.functional import Moments, merge_moments

__all__ = ["equalize_buffers", "norm_buffers"]


def norm_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that norms with running statistics remember."""
    for path, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if "running_mean" in buffers and "running_var" in buffers:
            for name, buffer in buffers.items():
                yield (f"{path}.{name}" if path else name), buffer


@torch.no_grad()
def equalize_buffers(model: nn.Module) -> dict[str, float]:
    """Give every worker the same norm buffers.

    With equal weights for all workers: mean of the running means; running variances are merged as
    parts of one population (mean of the variances plus the variance of the means). Other floating
    buffers are averaged; integer buffers become those of worker 0.

    Args:
        model: any module, of the same structure on every worker.

    Returns:
        By buffer, the largest absolute difference from worker 0 before; only those that differed.

    Note:
        A collective on CPU copies. A buffer that is equal everywhere is not touched.
    """
    group = resolve_group("all")
    buffers = {name: buffer.detach().cpu() for name, buffer in norm_buffers(model)}
    if group is None or not buffers:
        return {}

    every: list[dict[str, Tensor]] = all_gather_objects(buffers, group)
    stacks = {name: torch.stack([worker[name] for worker in every]) for name in buffers}
    differences = {}
    for name, buffer in norm_buffers(model):
        stack = stacks[name].double()
        difference = float((stack - stack[0]).abs().max())
        if difference != 0:  # also where it is NaN
            differences[name] = difference
            buffer.copy_(_merge_buffer(name, stacks))

    for module in model.modules() if differences else ():
        note = getattr(module, "note_statistics", None)  # of a norm whose frozen statistics are watched
        if note is not None:
            note()
    return differences


def _merge_buffer(name: str, stacks: dict[str, Tensor]) -> Tensor:
    stack = stacks[name]
    prefix, kind = name[: name.rfind(".") + 1], name.rpartition(".")[2]
    if not stack.is_floating_point():
        return stack[0]
    if kind not in ("running_mean", "running_var"):
        return stack.double().mean(0)

    mean, var = (stacks[f"{prefix}running_{moment}"].double() for moment in ("mean", "var"))
    count = torch.ones(mean.shape[:-1], dtype=mean.dtype)
    merged = merge_moments(Moments(count, mean, var))
    return merged.mean if kind == "running_mean" else merged.var

"""Gradient accumulation: one SGD step from several micro-batches, each of which is a normalization batch of its own.

The SGD batch grows, and what a batch norm sees does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import Refusal, StatisticsError
from bnext.numbers import is_count

__all__ = ["accumulate_gradients", "split_batch"]

UNEVEN = Refusal(
    StatisticsError,
    "a batch",
    "be a list whose number of samples {number} micro-batches divide",
    "Give as many samples per worker as a multiple of the micro-batches.",
)
NO_NUMBER = Refusal(StatisticsError, "number", "be a number of micro-batches, 1 or more", "Use 1 for the whole batch.")
NOT_COUNTED = Refusal(
    StatisticsError,
    "a micro-batch",
    "be a list or a tensor of samples where num_samples does not say how many it holds",
    "For (images, labels) give num_samples=lambda batch: len(batch[0]).",
)
NO_LOSS = Refusal(
    StatisticsError,
    "the loss of a micro-batch",
    "be a tensor of one element, or a mapping of names to such tensors",
    "Return the mean over the samples of the micro-batch.",
)
NO_SAMPLES = Refusal(
    StatisticsError,
    "micro-batches",
    "hold samples",
    "Give at least one, and their numbers of samples where some are empty.",
)


def split_batch(batch: Sequence[Any], number: int) -> list[Sequence[Any]]:
    """Cut the samples of a batch, in their order, into micro-batches of equal size.

    Args:
        batch: a list of samples, or a tensor [N, ...].
        number: of micro-batches; it divides N.

    Raises:
        StatisticsError: it does not, or the batch is a tuple, such as (images, labels), or has no length.

    Example:
        >>> split_batch([1, 2, 3, 4], 2)
        [[1, 2], [3, 4]]
    """
    if not is_count(number, 1):
        raise NO_NUMBER.of(repr(number), "split_batch")
    is_sequence = isinstance(batch, (Sequence, Tensor)) and not isinstance(batch, (str, tuple))
    if not is_sequence or not len(batch) or len(batch) % number:
        got = f"{len(batch)} samples" if is_sequence else type(batch).__name__
        raise UNEVEN.of(got, number=number)

    size = len(batch) // number
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Iterable[Any],
    compute_loss: Callable[[Any], Tensor | Mapping[str, Tensor]],
    *,
    num_samples: Callable[[Any], int] | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> dict[str, Tensor]:
    """Add the gradients of one SGD step from several micro-batches, between `zero_grad()` and `step()`.

        loss = sum_i (n_i / n) loss_i,   n = sum_i n_i

    For a loss that is a mean over samples this is the loss of all samples together, if no norm couples them beyond a
    micro-batch: with frozen norms, with GroupNorm, or with a Ghost BN whose groups are the micro-batches. A loss with a
    normalizer of its own (foreground anchors, say) has the normalizer of each micro-batch.

    Args:
        model: that is trained; in DistributedDataParallel workers exchange gradients in the last micro-batch alone.
        micro_batches: of this worker, one after another; as many on every worker.
        compute_loss: called as compute_loss(micro_batch); a mapping of losses is summed.
        num_samples: called as num_samples(micro_batch), n_i; None: the length of a list or a tensor of samples.
        backward: called as backward(loss) with the weighted loss, as `lambda loss: scaler.scale(loss).backward()`. The
            scaler's `step` and `update` come once, after all micro-batches.

    Returns:
        The weighted sums of the losses by name, without gradient; of a plain tensor under "loss".

    Raises:
        StatisticsError: there is no sample, or nobody says how many, or a loss is not of one element.

    Note:
        Running statistics take in each micro-batch: they move as often in a step as there are micro-batches.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> data = torch.randn(8, 3)
        >>> losses = accumulate_gradients(model, split_batch(data, 4), lambda x: model(x).square().mean())
        >>> sorted(losses), model.weight.grad.shape
        (['loss'], torch.Size([1, 3]))
    """
    batches = list(micro_batches)
    numbers = [(num_samples or _count_samples)(batch) for batch in batches]
    total = sum(numbers)
    if total < 1:
        raise NO_SAMPLES.of(f"{len(batches)} micro-batches with {total} samples")

    sums: dict[str, Tensor] = {}
    for index, (batch, number) in enumerate(zip(batches, numbers, strict=True)):
        is_last = index == len(batches) - 1
        waits = isinstance(model, DistributedDataParallel) and not is_last

        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            losses = _name_losses(compute_loss(batch))
            share = number / total
            backward(sum(losses.values()) * share)  # type: ignore[arg-type]

        for name, loss in losses.items():
            weighted = loss.detach() * share if number else torch.zeros_like(loss)  # the mean of nothing is NaN
            sums[name] = sums[name] + weighted if name in sums else weighted

    return sums


def _count_samples(batch: Any) -> int:
    """The length of a list or a tensor of samples, not that of a batch in parts, such as images and their labels."""
    parts = batch if isinstance(batch, list) else []
    dims = {part.dim() if isinstance(part, Tensor) else None for part in parts}
    is_in_parts = len(dims) > 1 and None not in dims
    if not isinstance(batch, (list, Tensor)) or is_in_parts:
        raise NOT_COUNTED.of("a list of tensors that are no samples" if is_in_parts else type(batch).__name__)
    return len(batch)


def _name_losses(losses: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {"loss": losses} if isinstance(losses, Tensor) else losses
    if not isinstance(named, Mapping) or not named:
        raise NO_LOSS.of(type(losses).__name__)

    for name, loss in named.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise NO_LOSS.of(shape, name)
    return dict(named)

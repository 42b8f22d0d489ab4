"""Collectives out of place: the input is never changed, and a missing group is the identity.

They carry no gradient; functions with a backward of their own call them in both directions. `where` is what the
error says that the workers were doing when one of them did not take part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bnext.errors import WorkerError

__all__ = ["all_gather_numbers", "all_gather_objects", "all_gather_stacked", "all_reduce_sum", "all_to_all_rows"]

T = TypeVar("T")


def all_gather_stacked(tensor: Tensor, group: dist.ProcessGroup | None, where: str = "") -> Tensor:
    """Stack the tensors of all workers of the group: [R, *tensor.shape], in rank order.

    Raises:
        WorkerError: another worker has failed, or did not come in time.

    Note:
        The shape and type must be equal on all workers: send counts beside sums, never rows of
        uneven number.
    """
    if group is None:
        return tensor.unsqueeze(0)

    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    with _naming_failures(group, where):
        dist.all_gather(gathered, tensor.contiguous(), group=group)
    return torch.stack(gathered)


def all_gather_numbers(
    numbers: Sequence[int], group: dist.ProcessGroup | None, device: torch.device, where: str = ""
) -> list[list[int]]:
    """The numbers of all workers of the group, in rank order; as many on each. It waits for the device.

    Raises:
        WorkerError: another worker has failed, or did not come in time.
    """
    if group is None:
        return [list(numbers)]

    message = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    every = all_gather_stacked(message, group, where)
    with _naming_failures(group, where):  # on a GPU a failure shows here
        return every.tolist()


def all_gather_objects(value: T, group: dist.ProcessGroup | None, where: str = "") -> list[T]:
    """The values of all workers of the group, in rank order; they travel by pickle.

    Raises:
        WorkerError: another worker has failed, or did not come in time.
    """
    if group is None:
        return [value]

    gathered: list[Any] = [None] * group.size()
    with _naming_failures(group, where):
        dist.all_gather_object(gathered, value, group=group)
    return gathered


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None, where: str = "") -> Tensor:
    """The sum of the tensors of all workers of the group.

    Raises:
        WorkerError: another worker has failed, or did not come in time.
    """
    if group is None:
        return tensor

    total = tensor.clone(memory_format=torch.contiguous_format)
    with _naming_failures(group, where):
        dist.all_reduce(total, group=group)
    return total


def all_to_all_rows(
    rows: Tensor,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    group: dist.ProcessGroup | None,
    where: str = "",
) -> Tensor:
    """Send consecutive rows to each worker of the group, and get theirs, in rank order.

    Args:
        rows: [N, ...], the same shape but for N, and type, on all workers.
        send_sizes: rows for each worker, N in sum; 0 is allowed.
        receive_sizes: rows from each worker.

    Returns:
        [sum of `receive_sizes`, ...], contiguous.

    Raises:
        WorkerError: another worker has failed, or did not come in time.
    """
    if group is None:
        return rows

    received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
    with _naming_failures(group, where):
        dist.all_to_all_single(received, rows.contiguous(), list(receive_sizes), list(send_sizes), group=group)
    return received


@contextlib.contextmanager
def _naming_failures(group: dist.ProcessGroup, where: str) -> Iterator[None]:
    """The backend's error says neither who waited nor for what."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise WorkerError.of(
            "every worker",
            "take part in what workers share",
            got=f"a failure on worker {dist.get_rank()} of {dist.get_world_size()}, which waited for another one",
            where=f"{where or 'a collective'}: {error}",
            remedy="Look for the first error of the other workers; without one, a worker does not run this layer in "
            "every step.",
        ) from error

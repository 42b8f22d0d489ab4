"""Collectives: right, in rank order, and out of place."""

import itertools

import pytest
import torch

from bnext.distributed import all_gather_stacked, all_reduce_sum, resolve_group
from tests.workers import run_workers


def run_collectives(rank):
    group = resolve_group("all")
    answers = []
    for tensor in (torch.full((2, 3), rank + 1.0).t(), torch.full((3, 2), rank + 1.0)):  # contiguous or not
        gathered, total = all_gather_stacked(tensor, group), all_reduce_sum(tensor, group)
        answers.append((gathered, total, torch.equal(tensor, torch.full((3, 2), rank + 1.0))))
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_and_sum_over_workers(world_size):
    for gathered, total, unchanged in itertools.chain(*run_workers(run_collectives, world_size)):
        assert torch.equal(gathered, torch.stack([torch.full((3, 2), rank + 1.0) for rank in range(world_size)]))
        assert torch.equal(total, torch.full((3, 2), world_size * (world_size + 1) / 2))
        assert unchanged


def run_shapes(rank):
    """Types and shapes that a norm may send: nothing, one number, half types, a slice."""
    group = resolve_group("all")
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        for tensor in (
            torch.empty(0, 3, dtype=dtype),
            torch.ones((), dtype=dtype),
            torch.ones(4, 6, dtype=dtype)[:, 1],
        ):
            gathered, total = all_gather_stacked(tensor, group), all_reduce_sum(tensor, group)
            assert (gathered.dtype, total.dtype) == (dtype, dtype)
            assert (gathered.shape, total.shape) == ((2, *tensor.shape), tensor.shape)
            assert torch.equal(total, tensor * 2)
            found.append(total.data_ptr() != tensor.data_ptr() or tensor.numel() == 0)
    return all(found)


def test_any_type_and_shape():
    assert run_workers(run_shapes, 2) == [True, True]


def reduce_channels_last(rank):
    tensor = (torch.arange(24.0).view(1, 2, 3, 4) + rank).contiguous(memory_format=torch.channels_last)
    return all_reduce_sum(tensor, resolve_group("all")), all_gather_stacked(tensor, resolve_group("all"))


def test_the_memory_format_of_a_worker_does_not_matter():
    for total, gathered in run_workers(reduce_channels_last, 2):
        assert torch.equal(total, 2 * torch.arange(24.0).view(1, 2, 3, 4) + 1)
        assert torch.equal(gathered[1] - gathered[0], torch.ones(1, 2, 3, 4))

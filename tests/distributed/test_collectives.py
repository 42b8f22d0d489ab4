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

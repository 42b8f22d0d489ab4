"""Who shares something: alone, everything is the identity."""

import torch

from bnext.distributed import all_gather_stacked, all_reduce_sum, get_world_size, resolve_group
from tests.workers import run_workers


def test_alone_there_is_no_group_and_collectives_are_the_identity():
    assert get_world_size() == 1
    assert resolve_group("one") is None
    assert resolve_group("all") is None
    tensor = torch.arange(3.0)
    assert torch.equal(all_reduce_sum(tensor, None), tensor)
    assert torch.equal(all_gather_stacked(tensor, None), tensor.unsqueeze(0))


def describe_world(rank):
    group = resolve_group("all")
    return get_world_size(), resolve_group("one"), None if group is None else group.size()


def test_only_a_world_of_several_workers_has_a_group():
    assert run_workers(describe_world, 1) == [(1, None, None)]
    assert run_workers(describe_world, 2) == [(2, None, 2)] * 2

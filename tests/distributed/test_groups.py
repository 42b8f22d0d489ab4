"""Who shares something: alone, everything is the identity; groups are made once, by all, and refused by all."""

import os
import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bnext.distributed import all_gather_stacked, all_reduce_sum, get_world_size, groups, resolve_group
from bnext.errors import ConfigError
from tests.workers import run_workers


@pytest.mark.parametrize("workers", ["one", "node", "all", 1, 2, 7])
def test_alone_there_is_no_group_and_collectives_are_the_identity(workers):
    assert get_world_size() == 1
    assert resolve_group(workers) is None
    tensor = torch.arange(3.0)
    assert torch.equal(all_reduce_sum(tensor, None), tensor)
    assert torch.equal(all_gather_stacked(tensor, None), tensor.unsqueeze(0))


def describe_world(rank):
    group = resolve_group("all")
    return get_world_size(), resolve_group("one"), None if group is None else group.size()


def test_only_a_world_of_several_workers_has_a_group():
    assert run_workers(describe_world, 1) == [(1, None, None)]
    assert run_workers(describe_world, 2) == [(2, None, 2)] * 2


def list_members(rank, asked, nodes):
    """Per asked-for group the ranks in it, as a collective over it finds them; asked for twice."""
    found = []
    with mock.patch.object(socket, "gethostname", return_value=nodes[rank]):
        for workers in asked:
            group = resolve_group(workers)
            assert resolve_group(workers) is group, "a group is made once"
            ranks = all_gather_stacked(torch.tensor([rank]), group).flatten().tolist()
            assert get_world_size(group) == (len(ranks) if group else get_world_size())
            found.append(ranks)
    return found


@pytest.mark.parametrize(
    ("world_size", "nodes", "members"),
    [
        (3, "aab", {"one": [[0], [1], [2]], "node": [[0, 1], [0, 1], [2]], 3: [[0, 1, 2]] * 3, "all": [[0, 1, 2]] * 3}),
        (3, "bab", {"node": [[0, 2], [1], [0, 2]], 1: [[0], [1], [2]]}),
        (2, "ab", {"node": [[0], [1]], 2: [[0, 1]] * 2, "all": [[0, 1]] * 2}),
        (2, "aa", {"node": [[0, 1]] * 2}),
    ],
)
def test_members_of_groups(world_size, nodes, members):
    found = run_workers(list_members, world_size, list(members), nodes)
    assert [list(ranks) for ranks in zip(*found, strict=True)] == list(members.values())


def make_groups_in_one_world(rank):
    return groups._Groups.made == {}, resolve_group("node") is not None, resolve_group(2).size()


def test_groups_of_a_world_that_has_ended_are_not_used():
    for _ in range(2):
        assert [answer[1:] for answer in run_workers(make_groups_in_one_world, 2)] == [(True, 2)] * 2


def refuse(rank, workers):
    try:
        resolve_group(workers)
    except ConfigError as error:
        dist.barrier()
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("world_size", "workers", "divisors"), [(3, 2, "1, 3"), (2, 4, "1, 2")])
def test_a_number_that_does_not_divide_is_refused_by_all(world_size, workers, divisors):
    text = (
        f"workers must divide the number of all workers, {world_size}; got {workers} (NormSpec). Use one of {divisors}."
    )
    assert run_workers(refuse, world_size, workers, timeout=20) == [text] * world_size


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= groups.count_cores() <= os.cpu_count()
    assert not groups.is_running()

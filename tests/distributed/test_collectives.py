"""Collectives: right, in rank order, and out of place."""

import itertools
from unittest import mock

import pytest
import torch

from bnext.distributed import (
    all_gather_numbers,
    all_gather_stacked,
    all_reduce_sum,
    all_to_all_rows,
    get_rank,
    merge_moments_over_workers,
    resolve_group,
)
from bnext.errors import BNextError, WorkerError
from bnext.functional import batch_moments
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


# ---- numbers and rows


def run_numbers(rank):
    big = 2**62 - rank  # a seed keeps all its digits
    return all_gather_numbers([rank, big], resolve_group("all"), torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_numbers_of_all_workers(world_size):
    every = [[rank, 2**62 - rank] for rank in range(world_size)]
    assert run_workers(run_numbers, world_size) == [every] * world_size


SENT = [[2, 0, 3], [0, 0, 0], [1, 4, 0]]  # rows from each worker (of three) to each


def exchange(rank, dtype):
    rows = torch.arange(sum(SENT[rank])).mul(10).add(rank).to(dtype)[:, None].expand(-1, 2)  # not contiguous
    before = rows.clone()
    received = all_to_all_rows(rows, SENT[rank], [own[rank] for own in SENT], resolve_group("all"))
    assert torch.equal(rows, before)
    assert received.is_contiguous()
    return received


def test_rows_go_to_the_workers_that_they_are_for_in_rank_order():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        results = run_workers(exchange, 3, dtype)
        for rank, received in enumerate(results):
            expected = [
                10.0 * index + sender
                for sender, own in enumerate(SENT)
                for index in range(sum(own[:rank]), sum(own[: rank + 1]))
            ]
            assert (received.dtype, received.shape) == (dtype, (len(expected), 2))
            assert received[:, 0].double().tolist() == expected
            assert torch.equal(received[:, 0], received[:, 1])


def test_alone_rows_and_numbers_stay():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(all_to_all_rows(rows, [3], [3], None), rows)
    assert all_gather_numbers([4, 2], None, torch.device("cpu")) == [[4, 2]]
    assert get_rank(None) == 0


# ---- a worker that fails


def wait_for_nobody(rank, name):
    """The last worker has gone; the others wait for it."""
    group = resolve_group("all")
    if rank == group.size() - 1:
        return None
    rows = torch.ones(2, 3)
    calls = {
        "gather": lambda where: all_gather_stacked(rows, group, where),
        "numbers": lambda where: all_gather_numbers([1], group, torch.device("cpu"), where),
        "sum": lambda where: all_reduce_sum(rows, group, where),
        "rows": lambda where: all_to_all_rows(rows, [1] * 2, [1] * 2, group, where),
        "moments": lambda where: merge_moments_over_workers(batch_moments(rows), group, where),
        "nowhere": lambda where: all_reduce_sum(rows, group),
    }
    try:
        calls[name]("roi_heads.box_head.conv1.norm")
    except BNextError as error:
        return type(error), str(error), error.__cause__ is not None
    return "nothing"


@pytest.mark.parametrize("name", ["gather", "numbers", "sum", "rows", "moments", "nowhere"])
def test_who_waits_for_a_worker_that_has_failed_is_told(name):
    (kind, text, has_cause), _ = run_workers(wait_for_nobody, 2, name, timeout=20)
    assert kind is WorkerError
    assert has_cause
    where = "a collective" if name == "nowhere" else "roi_heads.box_head.conv1.norm"
    assert f"got a failure on worker 0 of 2, which waited for another one ({where}: " in text
    assert text.startswith("every worker must take part in what workers share; ")
    assert text.endswith(
        "Look for the first error of the other workers; without one, a worker does not run this layer in every step."
    )


def run_out_of_memory(rank):
    group = resolve_group("all")
    with pytest.raises(torch.OutOfMemoryError), mock.patch("torch.distributed.all_reduce", side_effect=_OUT_OF_MEMORY):
        all_reduce_sum(torch.ones(2), group)
    return True


_OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def test_a_lack_of_memory_is_not_the_fault_of_another_worker():
    assert run_workers(run_out_of_memory, 2) == [True, True]

"""Moments merged over workers: gathered by all, or by an owner of each part, are the same."""

import pytest
import torch

from bnext.distributed import moments as of_workers
from bnext.distributed import resolve_group
from bnext.functional import Moments, merge_moments
from tests.workers import run_workers

NUM_CHANNELS = 5
SIZES = (1, 2, 3, 4, 7)  # parts: fewer than workers, as many, no multiple of them


def draw_parts(rank, num_parts, dtype):
    """Parts of a worker, some of them empty; worker 1 has nothing."""
    generator = torch.Generator().manual_seed(10 * num_parts + rank)
    count = torch.randint(0, 4, (num_parts,), generator=generator).to(dtype) * (rank != 1)
    values = torch.randn(2, num_parts, NUM_CHANNELS, generator=generator, dtype=torch.float64).to(dtype)
    is_filled = (count > 0).unsqueeze(1)
    return Moments(count, (1e3 + values[0]) * is_filled, values[1].square() * is_filled)


def merge_both_ways(rank, dtype):
    """For each number of parts the moments, merged by owners and gathered."""
    group = resolve_group("all")
    results = []
    for size in SIZES:
        parts = draw_parts(rank, size, dtype)
        gathered = of_workers.merge_moments_over_workers(parts, group)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of_workers, "LEAST_OWNERS", 2)
            results.append((of_workers.merge_moments_over_workers(parts, group), gathered))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", [2, 3])
def test_owners_give_what_all_gather_and_the_same_to_all(world_size, dtype):
    every = run_workers(merge_both_ways, world_size, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14

    for index, size in enumerate(SIZES):
        parts = [draw_parts(rank, size, dtype) for rank in range(world_size)]
        expected = merge_moments(Moments(*map(torch.stack, zip(*parts, strict=True))))

        for results in every:
            by_owners, gathered = results[index]
            for value, other, right, first in zip(by_owners, gathered, expected, every[0][index][0], strict=True):
                assert (value.dtype, value.shape) == (dtype, right.shape)
                assert torch.equal(other, right)
                torch.testing.assert_close(value, right, rtol=tolerance, atol=0)
                assert torch.equal(value, first)


def note_calls(rank):
    """Collectives that two numbers of parts take, and the rows that a worker gives to each."""
    calls = []

    def note(exchange):
        def call(rows, *rest):
            calls.append((exchange.__name__, len(rows)))
            return exchange(rows, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_workers, "LEAST_OWNERS", 3)
        patch.setattr(of_workers, "all_gather_stacked", note(of_workers.all_gather_stacked))
        patch.setattr(of_workers, "all_to_all_rows", note(of_workers.all_to_all_rows))
        for size in (2, 4):
            of_workers.merge_moments_over_workers(draw_parts(rank, size, torch.float32), resolve_group("all"))
    return calls


def test_parts_have_owners_where_there_are_as_many_as_workers():
    gathered = [("all_gather_stacked", 2)]
    by_owners = [("all_to_all_rows", 6), ("all_gather_stacked", 2)]  # 4 parts and 2 empty ones, 2 for each worker
    assert run_workers(note_calls, 3) == [gathered + by_owners] * 3


def test_rows_received():
    assert not of_workers.has_owners(15, 15)
    assert not of_workers.has_owners(16, 15)
    assert of_workers.has_owners(16, 16)
    assert of_workers.count_rows(16, 16, by_owners=False) == 15 * 16
    assert of_workers.count_rows(16, 16, by_owners=True) == 2 * 15
    assert of_workers.count_rows(3, 4, by_owners=True) == 2 * 2 * 2

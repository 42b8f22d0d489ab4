"""Quantities counted beside the pairs: peak memory, collectives and their bytes, starts of processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.harness import Setting
from bench.memory import PeakMemory, measure_peak
from bench.starts import Start
from bench.traffic import CountingCollectives
from bnext.errors import BNextError
from tests.workers import run_workers

MEGABYTE = 250_000  # numbers of float32


def test_the_peak_holds_what_lives_at_once_and_what_an_operator_needs_within():
    def step():
        kept = torch.empty(MEGABYTE)
        torch.empty(3 * MEGABYTE)  # is gone before the next
        return kept, torch.empty(MEGABYTE)

    assert measure_peak(step) == 4_000_000
    sorts = measure_peak(lambda: torch.empty(MEGABYTE).msort())
    assert sorts > 4_000_000  # values, indices of 8 bytes


def test_the_peak_of_arms_is_in_units_of_their_features():
    shapes = {"a": (4, 8, 16, 16)}
    row = PeakMemory("identity", "twice", shapes, nn.Identity, lambda: nn.Sequential(nn.ReLU(), nn.ReLU()), goal=3.0)
    identity, _ = row.run(Setting())
    assert identity.ours == 3.0  # the feature, and its gradient, which is a copy
    assert identity.verdict == "met"
    assert identity.other > 3.0


def count(rank):
    row, everyone = torch.zeros(5), [torch.zeros(5) for _ in range(2)]
    with CountingCollectives() as counter:
        dist.all_gather(everyone, row)  # 20 bytes to one other
        dist.all_reduce(row)  # twice half of 20
        dist.broadcast(row, src=0)
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4))  # half of 16
    dist.barrier()
    return counter.calls, counter.num_bytes


def test_collectives_are_counted_with_the_bytes_of_a_ring():
    assert run_workers(count, 2) == [(4, 20 + 20 + 20 + 8)] * 2


def test_a_start_is_measured_to_its_mark_or_its_end_and_refused_without():
    loop = "import time; print('ready', flush=True); time.sleep(60)"
    assert Start("waits", ["-S", "-c", loop], mark="ready").time() < 30
    assert Start("ends", ["-S", "-c", "pass"]).time() < 30
    with pytest.raises(BNextError, match="status 3"):
        Start("fails", ["-S", "-c", "raise SystemExit(3)"]).time()
    with pytest.raises(BNextError, match="its mark"):
        Start("says nothing", ["-S", "-c", "pass"], mark="ready").time()

"""Collectives of a step, counted and sized on two gloo workers; NCCL gets the same calls."""

import pytest
import torch
from torch import nn

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, deal_statistics
from tests.collectives import NotedCollectives
from tests.workers import run_workers

C, LEVELS = 8, ("p3", "p4", "p5", "p6", "p7")
MOMENTS, SUMS = 4 * (2 * C + 1), 4 * 2 * C  # bytes of a part, forward and backward


def make_arms():
    def spec(row):
        return NormSpec.from_table5_row(row, workers="all")

    box_head = nn.Sequential(*(BatchNorm2d(C, NormSpec(workers="all")) for _ in range(4)))
    deal_statistics(box_head, num_groups=2)
    arms = {f"row {row}": LevelBatchNorm2d(C, LEVELS, spec(row)) for row in (1, 6)}
    return {"one level": BatchNorm2d(C, NormSpec(workers="all")), "dealt": box_head, **arms}


def step_each(rank):
    """Names and bytes of the collectives forward, and backward."""
    noted = {}
    for name, arm in make_arms().items():
        count = 0 if name == "dealt" and rank else 3  # of RoIs a worker may have none
        features = {level: torch.randn(count, C, 4, 4).requires_grad_() for level in LEVELS}
        with NotedCollectives() as forward:
            outputs = arm(features) if isinstance(arm, LevelBatchNorm2d) else {"p3": arm(features["p3"])}
        with NotedCollectives() as backward:
            sum(output.square().sum() for output in outputs.values()).backward()
        noted[name] = (forward.names, forward.num_bytes), (backward.names, backward.num_bytes)
    return noted


@pytest.fixture(scope="module")
def noted():
    first, second = run_workers(step_each, 2)
    assert first == second
    return first


def test_a_norm_gathers_once_and_sums_once(noted):
    """As torch's SyncBatchNorm does for one feature: for five levels that would be ten collectives."""
    for name, num_parts, num_mini_batches in (("one level", 1, 1), ("row 1", 5, 1), ("row 6", 5, 5)):
        assert noted[name] == ((["allgather_"], num_parts * MOMENTS), (["allreduce_"], num_mini_batches * SUMS))


def test_dealt_statistics_are_moments_of_two_groups(noted):
    """Numbers of RoIs once for the head, then once for each of its four norms."""
    (names, num_bytes), backward = noted["dealt"]
    assert names == ["allgather_"] * 5
    assert 0 < num_bytes - 4 * 2 * MOMENTS <= 64
    assert backward == (["allreduce_"] * 4, 4 * 2 * SUMS)

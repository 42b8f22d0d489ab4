"""Collectives of a step, counted and sized on two gloo workers; NCCL gets the same calls."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, deal_statistics
from tests.workers import run_workers

C, LEVELS = 8, ("p3", "p4", "p5", "p6", "p7")
FLOAT = 4  # bytes


class Collectives(TorchDispatchMode):
    """Notes the collectives and the bytes that this worker gives to each."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            given = args[1] if "allgather" in function._schema.name else args[0]  # the first are the outputs
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            self.noted.append((function._schema.name, sum(x.numel() * x.element_size() for x in tensors)))
        return outputs


def make_arms():
    everyone = {"workers": "all"}
    box_head = nn.Sequential(*(BatchNorm2d(C, NormSpec(**everyone)) for _ in range(4)))
    deal_statistics(box_head, num_groups=2)
    return {
        "one level": BatchNorm2d(C, NormSpec(**everyone)),
        "row 1": LevelBatchNorm2d(C, LEVELS, NormSpec.from_table5_row(1, **everyone)),
        "row 6": LevelBatchNorm2d(C, LEVELS, NormSpec.from_table5_row(6, **everyone)),
        "dealt": box_head,
        "alone": LevelBatchNorm2d(C, LEVELS, NormSpec.from_table5_row(1)),
    }


def step_each(rank):
    noted = {}
    for name, arm in make_arms().items():
        count = 0 if name == "dealt" and rank else 3  # of RoIs a worker may have none
        features = {level: torch.randn(count, C, 4, 4).requires_grad_() for level in LEVELS}
        with Collectives() as collectives:
            outputs = arm(features) if isinstance(arm, LevelBatchNorm2d) else {"p3": arm(features["p3"])}
            forward = list(collectives.noted)
            sum(output.square().sum() for output in outputs.values()).backward()
        noted[name] = forward, collectives.noted[len(forward) :]
    return noted


@pytest.fixture(scope="module")
def noted():
    first, second = run_workers(step_each, 2)
    print(first)
    assert first == second
    return first


def test_a_norm_gathers_once_and_sums_once(noted):
    """As torch's SyncBatchNorm for one feature, whose five norms would have ten collectives for five levels."""
    moments, sums = 2 * C + 1, 2 * C
    for name, num_parts, num_mini_batches in (("one level", 1, 1), ("row 1", 5, 1), ("row 6", 5, 5)):
        forward, backward = noted[name]
        assert forward == [("c10d::allgather_", num_parts * moments * FLOAT)]
        assert backward == [("c10d::allreduce_", num_mini_batches * sums * FLOAT)]
    assert noted["alone"] == ([], [])


def test_dealt_statistics_are_a_thousandth_of_features(noted):
    """Numbers of RoIs once for the head; then moments and sums of the two groups for each of its four norms."""
    forward, backward = noted["dealt"]
    numbers, *moments = forward
    assert moments == [("c10d::allgather_", 2 * (2 * C + 1) * FLOAT)] * 4
    assert backward == [("c10d::allreduce_", 2 * 2 * C * FLOAT)] * 4
    assert numbers[0] == "c10d::allgather_"
    assert numbers[1] <= 64

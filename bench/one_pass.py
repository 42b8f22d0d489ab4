"""One pass of a re-estimation: the part of a detector that its norms see, against fvcore's whole forward."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn

from bench.harness import NOT_EQUAL, Setting
from bench.pairs import Timer, time_pairs
from bench.record import Result, Speed
from bench.training_steps import RETINANET, SECONDS, TOLERANCE, draw_batch
from bnext import recompute_population_statistics
from bnext.evaluation.reestimate import is_level_norm
from bnext.heads import forward_statistics

__all__ = ["ROWS", "OnePass"]


@dataclass(frozen=True)
class OnePass:
    """The statistics of a RetinaNet's head, from one batch.

    Args:
        name, peer: of ours and of the other.
        goal: least ratio that is aimed at.
    """

    name: str
    peer: str
    goal: float

    def run(self, setting: Setting) -> list[Result]:
        """The means are shown to be equal in float64, then passes are timed.

        Raises:
            BNextError: they are not.
        """
        batch = draw_batch()
        ours, other = RETINANET.build(setting.device)
        difference = self.measure_difference(ours.double(), other.double(), batch)

        ours, other = ours.float(), other.float()
        limits = dataclasses.replace(setting.limits, seconds=SECONDS)
        steps = (lambda: reestimate(ours, batch)), (lambda: reestimate_as_fvcore(other, batch))
        pairs = time_pairs(*steps, Timer(setting.device), limits)
        words = "as fvcore gives the variance of the batches, torch and we an estimate for all data"
        fields = {"averages_differ": words, "difference": difference, "goal": self.goal}
        return [Speed.of(pairs, self.name, self.peer, "NCHW", **fields)]

    def measure_difference(self, ours: nn.Module, other: nn.Module, batch: list[dict[str, Any]]) -> float:
        """The largest difference of a mean of the head, in the unit of the largest one."""
        reestimate(ours, batch)
        reestimate_as_fvcore(other, batch)

        means, expected = list_means(ours), list_means(other)
        worst = float((means - expected).abs().max() / expected.abs().max())
        if not worst <= TOLERANCE:
            raise NOT_EQUAL.of(f"a difference of {worst:.2g} in the means", self.name, tolerance=TOLERANCE)
        return worst


def reestimate(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Ours: the towers alone behind the backbone."""
    recompute_population_statistics(model, [batch], forward=forward_statistics, layers=is_level_norm)


def reestimate_as_fvcore(model: Any, batch: list[dict[str, Any]]) -> None:
    """fvcore's: anchors, predictors, matching and losses, too."""
    model.train()
    model.backbone.eval()
    with EventStorage():
        update_bn_stats(model, [batch], 1)


def list_means(model: Any) -> Tensor:
    """The means of the head: [norms x levels, C]."""
    buffers = [buffer for name, buffer in model.head.named_buffers() if name.endswith("running_mean")]
    return torch.stack(buffers)


ROWS = [OnePass("statistics of RetinaNet's head, one batch", "fvcore's update_bn_stats", goal=1.3)]

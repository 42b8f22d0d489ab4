"""An auxiliary domain: in each step copies of its images, adversarial or strongly augmented, are trained on as well.

    loss of the step = loss(images) + weight * loss(copies),   the copies of a domain of their own

With norms that have statistics per domain this is AdvProp; with shared ones it is plain adversarial training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from bnext.config.recipe import resolve_norms
from bnext.data.domains import find_auxiliary_domain
from bnext.data.strong_augmentation import augment_strongly
from bnext.evaluation.adversarial import make_adversarial
from bnext.losses import name_losses
from bnext.seeding import Purpose, derive_seed
from bnext.statistics.data_pass import Forward

__all__ = ["AuxiliaryImages", "build_auxiliary", "describe_auxiliary"]

_COST_OF_AN_ATTACK = 0.75  # of a step, for each step of an attack: a forward, and a backward without weights


class AuxiliaryImages:
    """Copies of the images of a step, in a domain of their own.

    Args:
        domain: its name.
        weight: of their loss; above 0.
        make: called as make(model, batch, forward, seed), gives the copies.

    Source:
        Xie et al., *Adversarial Examples Improve Image Recognition*, 2020 (AdvProp).
    """

    def __init__(
        self, domain: str, weight: float, make: Callable[[nn.Module, Any, Forward, int], list[dict[str, Any]]]
    ) -> None:
        self.domain = domain
        self.weight = weight
        self._make = make

    def make(self, model: nn.Module, batch: Any, forward: Forward, index: int) -> list[dict[str, Any]]:
        """The copies of a batch.

        Args:
            model: that is trained, with or without DistributedDataParallel.
            batch: of this worker, as the loader gives it.
            forward: the model's losses as the step computes them, see `make_adversarial`.
            index: of the micro-batch.

        Note:
            What is drawn at random follows the seed that `SeedSteps` gave to this step: iteration and worker.
        """
        seed = derive_seed(torch.initial_seed(), Purpose.AUXILIARY, index)
        return [{**record, "domain": self.domain} for record in self._make(model, batch, forward, seed)]

    def name(self, losses: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of copies, weighted, as "<domain>/<loss>"."""
        named = name_losses(losses, "a training step")
        return {f"{self.domain}/{name}": self.weight * loss for name, loss in named.items()}


def build_auxiliary(cfg: CfgNode) -> AuxiliaryImages | None:
    """The images that SOLVER.BNEXT.AUXILIARY asks for, if it does.

    Args:
        cfg: a whole config, checked.
    """
    node, domain = cfg.SOLVER.BNEXT.AUXILIARY, find_auxiliary_domain(cfg)

    def attack(model: nn.Module, batch: Any, forward: Forward, seed: int) -> list[dict[str, Any]]:
        return make_adversarial(
            model,
            batch,
            epsilon=node.EPSILON,
            steps=node.STEPS,
            step_size=node.STEP_SIZE or None,
            loss=node.LOSS,
            domain=domain,
            forward=forward,
            seed=seed,
        )

    def augment(model: nn.Module, batch: Any, forward: Forward, seed: int) -> list[dict[str, Any]]:
        return augment_strongly(batch, seed, cfg.INPUT.FORMAT)

    if not domain:
        return None
    return AuxiliaryImages(domain, node.WEIGHT, attack if node.KIND == "adversarial" else augment)


def describe_auxiliary(cfg: CfgNode) -> str:
    """A sentence about the copies, whose statistics they use, and what they cost; "" without them."""
    node, domain = cfg.SOLVER.BNEXT.AUXILIARY, find_auxiliary_domain(cfg)
    if not domain:
        return ""

    way, times = "strongly augmented", 2.0
    if node.KIND == "adversarial":
        attacks, aim = (2, "the stronger of two losses") if node.LOSS == "stronger" else (1, f"the {node.LOSS} loss")
        steps = "1 step" if node.STEPS == 1 else f"{node.STEPS} steps"
        way = f"adversarial, by PGD of {steps} on {aim}, up to {node.EPSILON:g} of 255"
        times += _COST_OF_AN_ATTACK * attacks * node.STEPS

    shares = "they share all statistics and affines with the images, as no norm has anything per domain"
    if domain in resolve_norms(cfg, says_unused=False).domains:
        shares = f"in norms with something per domain they are of {domain!r}"
    return f"Each step also trains on copies of its images ({way}): it takes about {times:.2g} times as long; {shares}."

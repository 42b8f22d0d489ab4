"""The lines of a training about itself before its first iteration; the config is said by the command line."""

from __future__ import annotations

import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from bnext.data.loader import TrainLoader
from bnext.data.sampling.domain_batches import DomainBatchSampler
from bnext.engine.auxiliary import describe_auxiliary

__all__ = ["describe_training"]


def describe_training(cfg: CfgNode, loader: Any, start_iter: int = 0) -> str:
    """The data and the schedule in a line; in others what a batch is made of, and its copies, where that is chosen.

    Args:
        cfg: DATASETS.TRAIN, SOLVER.IMS_PER_BATCH, MAX_ITER and BNEXT.AUXILIARY are read.
        loader: of the training; of a foreign one the number of images is not known.
        start_iter: the iteration to begin with.
    """
    batch, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER
    workers = comm.get_world_size()
    share = f" over {workers} workers" if workers > 1 else ""
    rest = f" from iteration {start_iter:,}" if start_iter else ""

    words, domains = f"Training on {', '.join(cfg.DATASETS.TRAIN)}", ""
    if isinstance(loader, TrainLoader) and isinstance(loader.sampler, DomainBatchSampler):
        words += f": {loader.num_images:,} images"
        domains = f"\n{_describe_domains(loader.sampler)}"
    elif isinstance(loader, TrainLoader):
        epochs = batch * steps / max(1, loader.num_images)
        shown = f"{epochs:.1f}" if epochs < 10 else f"{math.floor(epochs):,}"
        words += f": {loader.num_images:,} images, {shown} epochs"
    lines = [f"{words}; {batch} images a step{share}, {steps:,} steps{rest}.{domains}", describe_auxiliary(cfg)]
    return "\n".join(filter(None, lines))


def _describe_domains(sampler: DomainBatchSampler) -> str:
    """The make-up of a batch, and the epochs of each domain."""
    batch, whole = sampler.total_batch_size, sum(sampler.weights.values())
    shares = {domain: weight / whole for domain, weight in sampler.weights.items()}

    if sampler.kind == "composed":
        numbers = {domain: batch * share for domain, share in shares.items()}
        is_exact = all(math.isclose(number, round(number)) for number in numbers.values())
        parts = ", ".join(f"{_show(number)} {domain}" for domain, number in numbers.items())
        words = f"Batches of {batch}: {'' if is_exact else 'on average '}{parts}"
    else:
        parts = ", ".join(f"{share:.3g} {domain}" for domain, share in shares.items())
        turns = "drawn at random" if sampler.kind == "random_domain" else "in turn"
        words = f"Batches of {batch // sampler.num_micro_batches}, each of one domain {turns}, by shares {parts}"

    epochs = []
    for domain, images in sampler.members.items():
        epochs.append(f"of the {len(images):,} images of {domain} {_show(len(images) / batch / shares[domain])}")
    return f"{words}. Iterations of an epoch {', '.join(epochs)}."


def _show(number: float) -> str:
    """A number to three digits, and to the last before the point."""
    return f"{number:.3g}" if number < 100 else f"{round(number):,}"

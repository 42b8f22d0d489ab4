"""The losses on held-out labelled images, without a trace in the model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from bnext.distributed import LockStep, count_images, unwrap_model
from bnext.distributed.equal_buffers import equalize_buffers
from bnext.errors import StatisticsError, check_choice
from bnext.layers.counts import not_counting_domains
from bnext.layers.shuffled import shares_work
from bnext.layers.walk import find_bnext_norms
from bnext.losses import name_losses
from bnext.progress import showing_progress
from bnext.scope.model import restoring
from bnext.scope.statistics import as_in_training
from bnext.seeding import Purpose, derive_seed
from bnext.statistics.arguments import check_data
from bnext.statistics.data_pass import Forward

__all__ = ["Statistics", "compute_validation_loss", "find_device"]

Statistics = Literal["population", "mini_batch"]
_WHERE = "compute_validation_loss"


def compute_validation_loss(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    statistics: Statistics = "population",
    forward: Forward | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The losses of a model on labelled images, of which the model keeps nothing.

        loss = sum over batches (images of the batch * its loss) / images

    The losses of detectors are only computed in training mode, in which batch norms would normalize by the mini-batch
    and remember it. Here `statistics` says what normalizes, and nothing is remembered.

    Args:
        model: returns a dictionary of losses, or one loss, in training mode.
        batches: of this worker, with labels; a list of records each, for detectron2's models.
        statistics: "population": norms are as at inference, so that the loss tells of the model that is evaluated.
            "mini_batch": as in training, so that it differs from the training's loss by the images alone. The first
            minus the second is the train-test inconsistency, the second minus the training's the generalization gap.
        forward: called as forward(model, batch), gives the losses; default model(batch).
        seed: 0 or more: of what is drawn, such as RoIs, or by `batches` in this process; the same draws each time make
            values comparable.

    Returns:
        The mean of each loss by its name, and of their sum as "total_loss"; equal on every worker. Detectron2's dense
        detectors divide their losses by a moving average of a worker's foreground anchors, which begins with what the
        model holds: compare values of the same number of images per worker, and of a model that was trained here.

    Raises:
        StatisticsError: there is no image, a worker has none or has failed, the model returns no losses, or `batches`
            or `seed` cannot be.
        ConfigError: another kind of `statistics`.

    Note:
        Afterwards, also after an exception, all buffers, modes, gradients and random generators are bitwise as they
        were, and plain attributes, such as the moving average of foreground anchors that dense detectors keep.
        Everything but norms is in training mode, without dropout. Population statistics that differ between workers
        are merged for this loss. Collectives: one per batch, and one or two more; a worker that has fewer batches
        repeats its last one, which is not counted.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> def loss_of(model, batch):
        ...     return model(batch).square().mean()
        >>> batches = [torch.ones(2, 3, 8, 8), torch.ones(1, 3, 8, 8)]
        >>> sorted(compute_validation_loss(model, batches, forward=loss_of))
        ['loss', 'total_loss']
        >>> int(model[1].num_batches_tracked)
        0

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 4.1 (the two readings of a validation);
        facebookresearch/detectron2#810 and #1857, weecology/DeepForest#477 for what goes wrong otherwise.
    """
    check_choice("statistics", statistics, get_args(Statistics), where=_WHERE)
    check_data(batches, _WHERE, "batches")
    if not isinstance(seed, int) or seed < 0:
        raise StatisticsError.of("seed", "be an integer of 0 or more", got=repr(seed), where=_WHERE, remedy="Use 0.")

    model, rank = unwrap_model(model), comm.get_rank()
    sums: dict[str, float] = {}
    num_images = 0

    # What the loader draws, too: torch's takes a seed from the global generator, and augmentations may run here.
    uncounted = not_counting_domains(find_bnext_norms(model).values())
    with torch.no_grad(), restoring(model, seed=derive_seed(seed, Purpose.LOAD_VALIDATION, rank)), uncounted:
        if statistics == "population":
            equalize_buffers(model)
        with as_in_training(model, by_population=statistics == "population"):
            shares = shares_work(model)
            rounds = LockStep(batches, find_device(model), _WHERE, shares_work=shares, repeats_last=True)
            with showing_progress("validation loss", unit="batch", is_wanted=rank == 0) as bar:
                for batch, is_new in rounds:
                    bar.update()
                    batch_seed = derive_seed(seed, Purpose.VALIDATE, rounds.num_rounds - 1, rank)
                    losses = rounds.run(partial(_measure, model, batch, forward, batch_seed))
                    if losses is None or not is_new:
                        continue
                    num_images += count_images(batch)
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0.0) + count_images(batch) * value

    return _average(sums, num_images)


def find_device(model: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _measure(model: nn.Module, batch: Any, forward: Forward | None, seed: int) -> dict[str, float]:
    """The losses of a batch by name, whatever batches came before it: they may leave a moving average."""
    with restoring(model, seed=seed), EventStorage():
        output = model(batch) if forward is None else forward(model, batch)

    return {name: float(value) for name, value in name_losses(output, _WHERE).items()}


def _average(sums: dict[str, float], num_images: int) -> dict[str, float]:
    """Over all workers, in their order: the same on each."""
    every = comm.all_gather((sums, num_images))
    total = sum(number for _, number in every)
    if total == 0:
        raise StatisticsError.of(
            "batches",
            "hold at least one image",
            got="none",
            where=f"{_WHERE}; DATASETS.TEST in a config",
            remedy="Pass a loader of labelled images, which can be gone through again each time.",
        )

    means: dict[str, float] = {}
    for worker, _ in every:
        for name, value in worker.items():
            means[name] = means.get(name, 0.0) + value
    means = {name: value / total for name, value in means.items()}
    return {**means, "total_loss": sum(means.values())}

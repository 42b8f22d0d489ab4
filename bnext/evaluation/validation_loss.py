"""The losses on held-out labelled images, without a trace in the model: as a function, and as a hook of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from bnext.distributed import all_gather_numbers, resolve_group, unwrap_model
from bnext.distributed.equal_buffers import equalize_buffers
from bnext.errors import StatisticsError, check_choice
from bnext.evaluation.without_trace import as_in_training, drawing_from, leaving_no_trace, restoring_attributes
from bnext.layers.shuffled import shares_work
from bnext.seeding import derive_seed
from bnext.statistics.arguments import check_data
from bnext.statistics.rounds import count_images

__all__ = ["Statistics", "compute_validation_loss", "find_device"]

Forward = Callable[[nn.Module, Any], object]
Statistics = Literal["population", "mini_batch"]
_VALIDATE, _LOAD = 10, 12  # what the derived seeds are for
_HAS, _REPEATS, _NEVER_HAD, _FAILED = 0, 1, 2, 3  # a batch, in a round
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
    check_data(batches, None, _WHERE, "batches")
    if not isinstance(seed, int) or seed < 0:
        raise StatisticsError(f"seed must be an integer of 0 or more; got {seed!r} ({_WHERE}). Use 0.")
    model = unwrap_model(model)
    sums: dict[str, float] = {}
    num_images = 0
    # What the loader draws, too: torch's takes a seed from the global generator, and augmentations may run here.
    with leaving_no_trace(model), drawing_from(model, derive_seed(seed, _LOAD, comm.get_rank())):
        if statistics == "population":
            equalize_buffers(model)
        with as_in_training(model, by_population=statistics == "population"):
            may_wait, failures = shares_work(model), []
            for number, (batch, is_counted) in enumerate(_in_lock_step(batches, find_device(model), failures)):
                own_seed = derive_seed(seed, _VALIDATE, number, comm.get_rank())
                try:
                    # Attributes per batch: a moving average would make the order of the batches count.
                    with restoring_attributes(model), drawing_from(model, own_seed), EventStorage():
                        losses = _read_losses(model(batch) if forward is None else forward(model, batch))
                except Exception as error:
                    if may_wait:
                        raise  # who waits for this worker in a layer cannot be told
                    failures.append(error)
                    continue
                if is_counted:
                    num_images += count_images(batch)
                    sums.update({n: sums.get(n, 0.0) + count_images(batch) * value for n, value in losses.items()})
    return _average(sums, num_images)


def _average(sums: dict[str, float], num_images: int) -> dict[str, float]:
    """Over all workers, in their order: the same on each."""
    every = comm.all_gather((sums, num_images))
    total = sum(number for _, number in every)
    if total == 0:
        raise StatisticsError(
            f"batches must hold at least one image; got none ({_WHERE}; DATASETS.TEST in a config). Pass a loader of "
            f"labelled images, which can be gone through again each time."
        )
    names = dict.fromkeys(name for own, _ in every for name in own)
    means = {name: sum(own.get(name, 0.0) for own, _ in every) / total for name in names}
    return {**means, "total_loss": sum(means.values())}


def _read_losses(output: object) -> dict[str, float]:
    named = output if isinstance(output, Mapping) else {"loss": output}
    if not named or not all(isinstance(value, Tensor) and value.numel() == 1 for value in named.values()):
        raise StatisticsError(
            f"model must return a dictionary of losses, or one, in training mode; got {type(output).__name__} "
            f"({_WHERE}). Pass forward=, which gives them for a batch."
        )
    return {name: float(value) for name, value in named.items()}


def _in_lock_step(
    batches: Iterable[Any], device: torch.device, failures: list[Exception]
) -> Iterator[tuple[Any, bool]]:
    """This worker's batches, and whether they count: what workers share in a forward needs as many on each.

    A failure, of the loader or in `failures`, is raised when the others know.
    """
    everyone, own, batch, state = resolve_group("all"), None, None, _NEVER_HAD
    while True:
        try:
            own = iter(batches) if own is None else own
            new = None if failures else next(own, None)
        except Exception as error:
            failures.append(error)
        if failures:
            state = _FAILED
        elif new is not None:
            batch, state = new, _HAS
        elif state == _HAS:
            state = _REPEATS
        states = [state for (state,) in all_gather_numbers([state], everyone, device, _WHERE)]
        if failures:
            raise failures[0]
        if _FAILED in states:
            raise StatisticsError(
                f"every worker must reach the end of its batches; got a failure on worker {states.index(_FAILED)} "
                f"({_WHERE}). Its own message says why."
            )
        if _HAS not in states:
            return
        if _NEVER_HAD in states:
            raise StatisticsError(
                f"batches must hold at least one on every worker; got none on worker {states.index(_NEVER_HAD)} "
                f"({_WHERE}). Use smaller batches, more images, or fewer workers."
            )
        yield batch, state == _HAS


def find_device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

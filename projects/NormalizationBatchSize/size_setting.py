"""Settings of the study of normalization batch sizes, checked before anything runs."""

from __future__ import annotations

import dataclasses
import math

from bnext.errors import ConfigError, check_choice
from bnext.studies.images import Selectable
from bnext.studies.setting import ImageSetting

__all__ = ["SizeSetting", "check_images"]

_SHRINKS = {"residual": 4, "resnet50": 32}  # side of the pictures / that of the last map
_WHERE = "settings of NormalizationBatchSize"


@dataclasses.dataclass(frozen=True)
class SizeSetting(ImageSetting):
    """Common settings of the trainings, and the axes of the study.

    Args:
        sizes: normalization batch sizes (NBS): images that are normalized together. Each divides `total_batch_size`.
        total_batch_size: images of a step of SGD, whatever the NBS.
        contrasts: all sizes are trained for each. A picture is multiplied by exp(contrast * z), z standard normal: with
            0 it stays as it is, with 1 every third differs by a factor of more than 2.7 from the median.
        shift: pixels by which a picture is moved at most, in both directions.
        flips: whether half of the training pictures are mirrored.
        val_repeats: how often a validation image comes, each time varied otherwise.
        model: "residual", the one of CIFAR, or "resnet50", torchvision's.
        depth, channels: of the residual model.
        learning_rate: at the start; it falls to zero as a cosine.
        epochs: of a training; from four fifths on a copy goes on as FrozenBN.
        num_estimated: training pictures of a re-estimation.
        spreads: the axis of the contrast. All axes are of the smallest size.
        depths, stages, rates, lengths, shifts: the other axes, for each of `contrasts`: depth, number of stages (each
            but the first halves the maps), learning rate, epochs, shift.
    """

    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    total_batch_size: int = 128
    contrasts: tuple[float, ...] = (0.0, 1.0)
    shift: int = 1
    flips: bool = False
    val_repeats: int = 4
    model: str = "residual"
    depth: int = 8
    channels: tuple[int, ...] = (16, 32, 64)
    learning_rate: float = 0.1
    epochs: int = 25
    num_estimated: int = 1280
    spreads: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    depths: tuple[int, ...] = (8, 20, 50)
    stages: tuple[int, ...] = (2, 3, 4)
    rates: tuple[float, ...] = (0.02, 0.1, 0.5)
    lengths: tuple[int, ...] = (10, 25, 75)
    shifts: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model", self.model, tuple(_SHRINKS), where=_WHERE)

        for name in ("sizes", "total_batch_size", "val_repeats", "epochs", "num_estimated", "lengths", "stages"):
            _check_range(name, getattr(self, name), least=1)
        for name in ("contrasts", "spreads", "shift", "shifts", "learning_rate", "rates"):
            _check_range(name, getattr(self, name), least=0)
        _check_sizes(self.sizes, self.total_batch_size)


def _check_range(name: str, given: float | tuple[float, ...], least: int) -> None:
    values = given if isinstance(given, tuple) else (given,)
    for value in values:
        if not (math.isfinite(value) and value >= least):
            raise ConfigError.of(name, f"be {least} or more", got=value, where=_WHERE, remedy="Correct it.")


def _check_sizes(sizes: tuple[int, ...], total: int) -> None:
    """Mini-batches are equal; a norm itself would cut 128 images for an NBS of 48 into 42, 43 and 43."""
    if not sizes:
        raise ConfigError.of("sizes", "name an NBS", got="none", where=_WHERE, remedy="Name some, as sizes=[2,8].")

    for size in sizes:
        if total % size:
            fitting = ", ".join(str(number) for number in range(1, total + 1) if total % number == 0)
            rule = f"divide the {total} images of total_batch_size, so that mini-batches are equal"
            remedy = f"Use some of {fitting}, or another total_batch_size."
            raise ConfigError.of("sizes", rule, got=size, where=_WHERE, remedy=remedy)


def check_images(setting: SizeSetting, train: Selectable, val: Selectable, side: int) -> None:
    """Refuse what only the images tell; `side` is that of the pictures in pixels.

    Raises:
        ConfigError: a split has no whole batch, or a mini-batch of one image has one element per channel.
    """
    total, smallest = setting.total_batch_size, min(len(train), len(val) * setting.val_repeats, setting.num_estimated)
    if smallest < total:
        rule = f"be at most {smallest}, the fewest pictures of training, validation (with repeats) and re-estimation"
        remedy = f"Use a power of 2 up to {smallest}, or a larger limit or num_estimated."
        raise ConfigError.of("total_batch_size", rule, got=total, where=_WHERE, remedy=remedy)

    shrink = _SHRINKS[setting.model]
    if min(setting.sizes) == 1 and side <= shrink:
        rule = "be 2 or more where the last map has a single element, as one element has no variance"
        remedy = f"Use sizes from 2 on, or a side above {shrink}."
        raise ConfigError.of("sizes", rule, got=1, where=f"pictures of {side} pixels", remedy=remedy)

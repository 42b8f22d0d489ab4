"""The trainings of the study by name: a grid of sizes and contrasts, and axes that leave it at the smallest size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from size_setting import SizeSetting
from size_training import train_size

__all__ = ["AXES", "PARTS", "list_axis", "list_trials", "name_trial"]

PARTS = ("sizes", "contrast", "axes")
# Setting that an axis changes -> the field with its values, in words.
AXES = {
    "depth": ("depths", "layers"),
    "stages": ("stages", "stages"),
    "learning_rate": ("rates", "learning rate"),
    "epochs": ("lengths", "epochs"),
    "shift": ("shifts", "pixels of shift"),
}

Trial = Callable[[int], dict[str, float]]


def name_trial(contrast: float, size: int, axis: str = "", value: float = 0) -> str:
    """The name of a training, such as contrast_1/nbs_2, or contrast_1/nbs_2/depth_20 on an axis."""
    name = f"contrast_{contrast:g}/nbs_{size}"
    return f"{name}/{axis}_{value:g}" if axis else name


def list_trials(setting: SizeSetting, parts: Sequence[str] = PARTS) -> dict[str, Trial]:
    """Name -> training, a function of the seed. A training that several parts need is there once."""
    smallest = min(setting.sizes)
    trials: dict[str, Trial] = {}

    def add(contrast: float, size: int) -> None:
        trials[name_trial(contrast, size)] = partial(train_size, setting, size, contrast)

    if "sizes" in parts:
        for contrast in setting.contrasts:
            for size in setting.sizes:
                add(contrast, size)

    if "contrast" in parts:
        for contrast in setting.spreads:
            add(contrast, smallest)

    if "axes" in parts:
        for contrast in setting.contrasts:
            for axis in AXES:
                for name, changed in list_axis(setting, contrast, axis).items():
                    trials.setdefault(name, partial(train_size, changed, smallest, contrast))

    return trials


def list_axis(setting: SizeSetting, contrast: float, axis: str) -> dict[str, SizeSetting]:
    """Name of the training -> its setting, along an axis; that of the setting itself has the grid's name."""
    smallest = min(setting.sizes)
    settings = {}
    for value in getattr(setting, AXES[axis][0]):
        changed = _change(setting, axis, value)
        name = name_trial(contrast, smallest, *(() if changed == setting else (axis, value)))
        settings[name] = changed
    return settings


def _change(setting: SizeSetting, axis: str, value: float) -> SizeSetting:
    if axis != "stages":
        return dataclasses.replace(setting, **{axis: value})

    # As many blocks in a stage as before; the last width is repeated.
    before, number = len(setting.channels), int(value)
    channels = (setting.channels + setting.channels[-1:] * number)[:number]
    depth = 2 + (setting.depth - 2) // before * number
    return dataclasses.replace(setting, channels=channels, depth=depth)

"""Trainings of the small net: one without a norm, one with batch norm, which is read in the ways of modes 2, 3 and 4.

Modes 2, 3 and 4 are one training: its gradients are of mini-batch statistics in all of them, and running statistics
have no part in them. The modes differ in what normalizes when the net is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bnext.errors import ConfigError
from bnext.scope.model import restoring
from bnext.statistics import recompute_population_statistics
from bnext.statistics.mini_batch_inference import normalizing_evaluation_by_mini_batch
from bnext.studies.classifiers import build_classifier, measure_accuracy, train_classifier
from bnext.studies.images import Batches, Selectable
from bnext.studies.setting import ImageSetting, load_split

__all__ = ["ModeSetting", "list_trials", "name_trial"]

_NORMS = {"none": None, "bn": nn.BatchNorm2d}
_WHERE = "settings of SmartBatchNorm"


@dataclasses.dataclass(frozen=True)
class ModeSetting(ImageSetting):
    """Common settings of the trainings of the small net, and its axis.

    Args:
        channels: of the convolutions.
        learning_rate: of Adam, which does not fall; that of the panels and of the tests.
        rates: the axis; it has `learning_rate` in it.
        batch_size: images of a step, and of a mini-batch that normalizes a reading between epochs.
        epochs: of a training, at least 2; the net is read after each.
        test_batch_sizes: images at a time in the tests at the end.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    learning_rate: float = 0.03
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    batch_size: int = 64
    epochs: int = 10
    test_batch_sizes: tuple[int, ...] = (1, 8, 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "rates"):
            _check_numbers(name, getattr(self, name), "be above 0", lambda rate: rate > 0 and math.isfinite(rate))
        for name in ("batch_size", "test_batch_sizes", "channels"):
            _check_numbers(name, getattr(self, name), "be 1 or more", lambda number: number >= 1)
        _check_numbers("epochs", self.epochs, "be 2 or more, as changes between them are measured", lambda n: n >= 2)
        _check_numbers("learning_rate", self.learning_rate, "be one of rates", lambda rate: rate in self.rates)


def _check_numbers(name: str, given: Any, rule: str, is_allowed: Callable[[Any], bool]) -> None:
    for number in given if isinstance(given, tuple) else (given,):
        if not is_allowed(number):
            raise ConfigError.of(name, rule, got=number, where=_WHERE, remedy="Correct it.")


def name_trial(norm: str, rate: float) -> str:
    """The name of a training: "none" or "bn", at a learning rate."""
    return f"{norm}, rate {rate:g}"


def list_trials(setting: ModeSetting) -> dict[str, Callable[[int], Mapping[str, Any]]]:
    """Name -> training, a function of the seed.

    Raises:
        BNextError: the images are not there, or too few for a mini-batch.
    """
    images = {split: load_split(setting, split) for split in ("train", "val")}
    Batches(images["train"], setting.batch_size)

    trials = {}
    for rate in (setting.learning_rate, *(rate for rate in setting.rates if rate != setting.learning_rate)):
        for norm in _NORMS:
            trials[name_trial(norm, rate)] = partial(_train_and_read, setting, images, norm, rate)
    return trials


def _train_and_read(
    setting: ModeSetting, images: Mapping[str, Selectable], norm: str, rate: float, seed: int
) -> dict[str, Any]:
    """A training, read after every epoch, and tested in all ways at its end.

    Returns:
        {"train": [accuracy, ...], "val": {reading: [accuracy, ...]}, "test": {reading: {batch size: accuracy}}}, in %.
    """
    train = images["train"]
    model = _build(setting, train, norm, seed)
    batches = Batches(train, setting.batch_size, setting.epochs, seed)
    per_epoch = len(batches) // setting.epochs
    readings = ("none",) if norm == "none" else ("moving_average", "mini_batch")
    curves: dict[str, list[float]] = {reading: [] for reading in ("train", *readings)}
    first_epoch: dict[str, Tensor] = {}

    def read(model: nn.Module, iteration: int) -> None:
        if (iteration + 1) % per_epoch:
            return
        if not first_epoch:
            first_epoch.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        curves["train"].append(_read(model, train, readings[-1], setting.batch_size))
        for reading in readings:
            curves[reading].append(_read(model, images["val"], reading, setting.batch_size))

    optimizer = Adam(model.parameters(), lr=rate)
    train_classifier(model, batches, optimizer=optimizer, decays=False, after_step=read)

    test = _test(setting, images, model, norm, first_epoch, seed)
    return {"train": curves.pop("train"), "val": curves, "test": test}


def _build(setting: ModeSetting, train: Selectable, norm: str, seed: int) -> nn.Module:
    options: dict[str, Any] = {"norm": _NORMS[norm], "channels": setting.channels}
    options["num_classes"] = int(train.labels.max()) + 1
    options["in_channels"] = train.select(torch.tensor([0])).pixels.shape[1]
    return build_classifier(seed, **options).to(setting.device)


def _read(model: nn.Module, images: Selectable, reading: str, batch_size: int) -> float:
    """Accuracy by the statistics that the model has, or by those of the mini-batches of the reading."""
    by_mini_batch = reading == "mini_batch"
    scope = normalizing_evaluation_by_mini_batch(model) if by_mini_batch else contextlib.nullcontext()
    with restoring(model), scope:
        return measure_accuracy(model.eval(), images, batch_size)


def _test(
    setting: ModeSetting,
    images: Mapping[str, Selectable],
    model: nn.Module,
    norm: str,
    first_epoch: Mapping[str, Tensor],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Reading -> test batch size -> accuracy of the final weights."""

    def test(reading: str) -> dict[str, float]:
        return {str(size): _read(model, images["val"], reading, size) for size in setting.test_batch_sizes}

    if norm == "none":
        return {"none": test("none")}
    results = {"moving_average": test("moving_average"), "mini_batch": test("mini_batch")}

    with restoring(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        results["fresh"] = test("fresh")

    with restoring(model):
        for name, buffer in model.named_buffers():
            buffer.copy_(first_epoch[name])
        results["stale"] = test("stale")

    epoch = Batches(images["train"], setting.batch_size, epochs=1, seed=seed)
    recompute_population_statistics(model, (batch.pixels for batch in epoch))
    results["estimated"] = test("estimated")
    return results

"""One training of the study: a classifier with a normalization batch size (NBS), and its errors by each statistics."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from size_setting import SizeSetting, check_images
from torch import nn
from torch.optim import Optimizer
from torchvision.models import resnet50
from varied_images import PixelBatches, VariedImages

from bnext.errors import StatisticsError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.scope.model import restoring
from bnext.seeding import Purpose, derive_seed
from bnext.statistics import recompute_population_statistics
from bnext.statistics.recompute import Estimator
from bnext.studies.classifiers import (
    ResidualClassifier,
    build_classifier,
    build_optimizer,
    measure_error,
    train_classifier,
)
from bnext.studies.images import Batches, Images, Selectable
from bnext.studies.setting import load_split
from bnext.surgery.freezing import freeze_norms

__all__ = ["POPULATIONS", "check_sets", "train_size"]

# Population statistics of the finished model -> their words.
POPULATIONS = {
    "moving_average": "moving average",
    "mini_batch": "re-estimated behind mini-batches",
    "whole_batch": "re-estimated behind whole batches",
    "layer_by_layer": "re-estimated layer by layer",
}
_TRAIN, _VAL, _ESTIMATE = 1, 2, 3  # pictures that are measured, or estimated on: each have a seed
_UNFROZEN = 0.8  # of the epochs


def check_sets(setting: SizeSetting) -> None:
    """Refuse images that are not there, or do not fit the settings.

    Raises:
        BNextError: names the set or the setting.
    """
    train, val = load_split(setting, "train"), load_split(setting, "val")
    check_images(setting, train, val, _read_shape(train)[-1])


def train_size(setting: SizeSetting, size: int, contrast: float, seed: int) -> dict[str, float]:
    """Train a classifier whose norms normalize `size` images together, and measure it.

    Args:
        setting: everything else.
        size: the NBS.
        contrast: of the pictures, see `SizeSetting`.
        seed: of weights, order and variation.

    Returns:
        Errors in %: "train" and "val" by mini-batch statistics, "val" of validation pictures; of these, too, "frozen",
        when FrozenBN has trained the last fifth, and one for each of `POPULATIONS`. "loss" is that of the last epoch.
        What a training that diverges does not reach is NaN.
    """
    return _Training(setting, contrast, seed).run(size)


class _Training:
    """Common parts of the trainings of a seed: pictures, rates, and how a model is measured."""

    def __init__(self, setting: SizeSetting, contrast: float, seed: int) -> None:
        self.setting, self.contrast, self.seed = setting, contrast, seed
        self._train, self._val = load_split(setting, "train"), load_split(setting, "val")
        self.num_steps = len(self._train) // setting.total_batch_size  # of an epoch

        self._pictures = {
            _TRAIN: self._pick(self._train, _TRAIN),
            _VAL: self._pick(self._val, _VAL, repeats=setting.val_repeats),
            _ESTIMATE: self._pick(self._train, _ESTIMATE, most=setting.num_estimated),
        }

    def _pick(self, images: Selectable, purpose: int, *, repeats: int = 1, most: int | None = None) -> VariedImages:
        """Whole batches of varied pictures."""
        number = len(images) * repeats if most is None else min(most, len(images) * repeats)
        number -= number % self.setting.total_batch_size
        seed = derive_seed(self.seed, purpose)
        return VariedImages(images, self.setting, self.contrast, seed, repeats=repeats, most=number)

    def run(self, size: int) -> dict[str, float]:
        """Train, from four fifths on in two copies, of which one is frozen; measure both."""
        model = self.build(size)
        optimizer = build_optimizer(model, self.setting.learning_rate)
        numbers = dict.fromkeys(("loss", "train", "val", *POPULATIONS, "frozen"), math.nan)

        cut, end = int(_UNFROZEN * self.setting.epochs), self.setting.epochs
        with contextlib.suppress(FloatingPointError, StatisticsError):
            self.go_on(model, optimizer, 0, cut)
            frozen = copy.deepcopy(model)
            momentum = copy.deepcopy(optimizer.state_dict())

            losses = self.go_on(model, optimizer, cut, end)
            numbers |= {"loss": statistics.fmean(losses[-self.num_steps :]), **self.measure(model)}

            freeze_norms(frozen, "statistics")  # at the moving averages of now; scale and shift are trained on
            optimizer = build_optimizer(frozen, self.setting.learning_rate)
            optimizer.load_state_dict(momentum)
            self.go_on(frozen, optimizer, cut, end)
            numbers["frozen"] = self.measure_error(frozen.eval(), _VAL)
        return numbers

    def build(self, size: int) -> nn.Module:
        """The model of the setting, in training mode."""
        setting = self.setting
        norm = partial(BatchNorm2d, spec=NormSpec(normalization_batch_size=size))
        num_classes = int(self._train.labels.max()) + 1

        if setting.model == "resnet50":
            options = {"kind": resnet50, "norm_layer": norm, "num_classes": num_classes}
        else:
            options = {"kind": ResidualClassifier, "depth": setting.depth, "channels": setting.channels, "norm": norm}
            options |= {"in_channels": _read_shape(self._train)[0], "num_classes": num_classes}
        return build_classifier(self.seed, **options).to(setting.device).train()

    def go_on(self, model: nn.Module, optimizer: Optimizer, start: int, end: int) -> list[float]:
        """Train from one epoch to another; the loss of each step.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        total, first = self.setting.epochs * self.num_steps, start * self.num_steps

        @contextlib.contextmanager
        def at_rate(iteration: int) -> Iterator[None]:
            """A cosine over the whole training, of which these epochs are a part."""
            share = (first + iteration) / total
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * self.setting.learning_rate * (1 + math.cos(math.pi * share))
            yield

        losses = train_classifier(
            model,
            self._draw(start, end),
            num_steps=(end - start) * self.num_steps,
            optimizer=optimizer,
            decays=False,
            around_step=at_rate,
        )
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError("the training has diverged")
        return losses

    def _draw(self, start: int, end: int) -> Iterator[Images]:
        """The batches of some epochs, each of which varies the pictures anew."""
        for epoch in range(start, end):
            seed = derive_seed(self.seed, Purpose.AUGMENT, epoch)
            pictures = VariedImages(self._train, self.setting, self.contrast, seed, flips=self.setting.flips)
            yield from Batches(pictures, self.setting.total_batch_size, epochs=1, seed=seed)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Errors by the mini-batch, as in training, and by all population statistics; the model is as before."""
        numbers = {"train": self.measure_error(model, _TRAIN), "val": self.measure_error(model, _VAL)}

        with restoring(model):
            numbers["moving_average"] = self.measure_error(model.eval(), _VAL)
            self._estimate(model)
            numbers["mini_batch"] = self.measure_error(model, _VAL)
            self._estimate(model, "layer_by_layer")
            numbers["layer_by_layer"] = self.measure_error(model, _VAL)

        whole = self.build(self.setting.total_batch_size).eval()
        whole.load_state_dict(model.state_dict())
        self._estimate(whole)
        numbers["whole_batch"] = self.measure_error(whole, _VAL)
        return numbers

    def _estimate(self, model: nn.Module, estimator: Estimator = "pooled") -> None:
        """Re-estimate the population statistics; behind a norm that takes mini-batches they depend on their size."""
        batches = PixelBatches(self._pictures[_ESTIMATE], self.setting.total_batch_size)
        recompute_population_statistics(model, batches, estimator=estimator)

    def measure_error(self, model: nn.Module, purpose: int) -> float:
        """In the mode that the model is in: in training mode its norms cut the batch into mini-batches, as in SGD."""
        return measure_error(model, self._pictures[purpose], self.setting.total_batch_size)


def _read_shape(images: Selectable) -> tuple[int, ...]:
    """C, S, S of the pictures."""
    return tuple(images.select(torch.zeros(1, dtype=torch.long)).pixels.shape[1:])

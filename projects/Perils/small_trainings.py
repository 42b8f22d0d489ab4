"""Shared by the stories of classifiers: digits, a training, and the data that the doctor gets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from perils import Extent
from torch import Tensor, nn

from bnext.studies.classifiers import train_classifier
from bnext.studies.images import Batches, Images, load_images

__all__ = ["ACCURACY", "load_digits", "take_pixels", "train_model"]

ACCURACY = "accuracy, %"


def load_digits(extent: Extent, domain: str = "scans") -> tuple[Images, Images]:
    """Images for training and for test."""
    options = {"domain": domain, "limit": extent.images}
    return load_images("train", **options), load_images("val", **options)


def train_model(model: nn.Module, images: Images, extent: Extent, seed: int, **options: object) -> nn.Module:
    """The model, trained, in evaluation mode."""
    train_classifier(model.train(), Batches(images, epochs=extent.epochs, seed=seed), **options)
    return model.eval()


def take_pixels(batches: Iterable[Images], number: int = 4) -> list[Tensor]:
    """Pixels of the first batches: the data that the doctor gets."""
    return [batch.pixels for batch in itertools.islice(batches, number)]

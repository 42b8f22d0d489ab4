"""Images of classifiers: handwritten digits, one a picture, in several domains; and the mini-batches of a training.

Digits are those of `bnext.data.digits`. Other sets, which a user has on a disk, are in `bnext.studies.image_sets`.

Shape letters: N images, C channels, S side of a picture in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bnext.data.digits_images import Sources, load_sources
from bnext.errors import ConfigError, check_choice
from bnext.seeding import Purpose, derive_seed

__all__ = ["DOMAINS", "Batches", "Composition", "Images", "Selectable", "load_images"]

Domain = Literal["scans", "negatives", "photographs"]
Composition = Literal["mixed", "one_class"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

_SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Pictures of one thing each.

    Args:
        pixels: [N, C, S, S], about 0 to 1.
        labels: [N], from 0.
        domain: where they come from, of `DOMAINS`.
    """

    pixels: Tensor
    labels: Tensor
    domain: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Images:
        """Some of them, in the order of the index."""
        index = index.to(self.labels.device)
        return Images(self.pixels[index], self.labels[index], self.domain)

    def to(self, device: torch.device | str) -> Images:
        """The same images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device), self.domain)


@functools.lru_cache(maxsize=16)
def load_images(split: str, domain: Domain = "scans", side: int = 16, limit: int | None = None) -> Images:
    """Digits of a split in a domain. Every domain has the same digits in the same order.

        scans:        bright ink on black
        negatives:    grey ink on white
        photographs:  ink on a piece of a photograph, bright on dark or dark on bright

    Args:
        split: "train" (1437 digits) or "val" (360 others).
        domain: see above.
        side: S of the pictures.
        limit: so many of the first digits; None: all.

    Raises:
        ConfigError: a split or a domain that there is not.
        DatasetError: scikit-learn, which has the digits, is not installed.
    """
    check_choice("split", split, _SPLITS, where="load_images")
    check_choice("domain", domain, DOMAINS, where="load_images")
    sources = load_sources(split)

    digits = sources.digits[:limit].astype(np.float32)
    ink = np.stack([np.asarray(_resize(digit, side)) for digit in digits]).clip(0, 1)
    if domain == "negatives":
        pixels = 1 - 0.7 * ink
    elif domain == "photographs":
        pixels = _paint_on_photographs(ink, sources, np.random.default_rng(_SPLITS.index(split)))
    else:
        pixels = ink

    labels = torch.from_numpy(sources.labels[:limit].astype(np.int64))
    return Images(torch.from_numpy(pixels.astype(np.float32))[:, None], labels, domain)


def _resize(picture: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(picture.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)


def _paint_on_photographs(ink: np.ndarray, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """Digits [N, S, S] on pieces of photographs, which are grey."""
    side = ink.shape[-1]
    greys = [photograph.mean(-1) / 255 for photograph in sources.backgrounds]

    pictures = []
    for digit in ink:
        grey = greys[int(rng.integers(len(greys)))]
        crop = int(rng.integers(4 * side, min(grey.shape)))
        top, left = (int(rng.integers(length - crop + 1)) for length in grey.shape)
        background = np.asarray(_resize(grey[top : top + crop, left : left + crop], side))

        background = background.mean() + 0.6 * (background - background.mean())
        colour = rng.uniform(0.75, 1) if background.mean() < 0.5 else rng.uniform(0, 0.25)
        pictures.append(background + digit * (colour - background))
    return np.stack(pictures)


class Selectable(Protocol):
    """Images of which some can be selected: `Images`, or pictures on a disk."""

    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""

    def select(self, index: Tensor) -> Images:
        """Some of them, in the order of the index."""


class Batches:
    """Mini-batches of a training, the same ones in every pass over them.

    Args:
        images: of which they are.
        size: images of each; the last of an epoch that are too few for one are left out.
        epochs: passes over the images.
        seed: of their order.
        composition: "mixed": images at random; "one_class": all of a mini-batch are of one class, as the RoIs of an
            image resemble one another.

    Raises:
        ConfigError: a composition that there is not, or mini-batches larger than what they are taken of.
    """

    def __init__(
        self, images: Selectable, size: int = 64, epochs: int = 10, seed: int = 0, composition: Composition = "mixed"
    ) -> None:
        check_choice("composition", composition, get_args(Composition), where="Batches")
        self.images, self.size, self.epochs, self.seed = images, size, epochs, seed

        everything = torch.arange(len(images))
        kinds = [everything]
        if composition == "one_class":
            classes = sorted(set(images.labels.tolist()))
            kinds = [everything[images.labels.cpu() == number] for number in classes]
        self._kinds = kinds

        if not self._count():
            smallest = max(map(len, kinds))
            rule = f"be from 1 to the {smallest} images that a mini-batch is taken of"
            raise ConfigError.of("size", rule, got=size, where="Batches", remedy="Choose a smaller one.")

    def _count(self) -> int:
        """Batches of an epoch."""
        return sum(len(kind) // self.size for kind in self._kinds) if self.size >= 1 else 0

    def __len__(self) -> int:
        return self.epochs * self._count()

    def __iter__(self) -> Iterator[Images]:
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.SHUFFLE, epoch))
            parts: list[Tensor] = []
            for kind in self._kinds:
                order = kind[torch.randperm(len(kind), generator=generator)]
                parts += [part for part in order.split(self.size) if len(part) == self.size]

            for number in torch.randperm(len(parts), generator=generator).tolist():
                yield self.images.select(parts[number])

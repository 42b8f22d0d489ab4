"""Small classifiers of handwritten digits that are trained in seconds, on one core, and again bit by bit by their seed.

Digits are those of `bnext.data.digits`, a digit a picture, in several domains; whoever studies them composes
mini-batches, a loss and what happens after a step. Tables, and the rows of a study of detectors, are elsewhere.

Shape letters: N images, S side of a picture in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from bnext.data.digits_images import Sources, load_sources
from bnext.errors import ConfigError, check_choice
from bnext.progress import track
from bnext.scope.model import restoring
from bnext.seeding import Purpose, derive_seed, seeded

__all__ = [
    "DOMAINS",
    "Batches",
    "Classifier",
    "Composition",
    "Images",
    "build_classifier",
    "build_optimizer",
    "compute_cross_entropy",
    "load_images",
    "measure_accuracy",
    "train_classifier",
]

Domain = Literal["scans", "negatives", "photographs"]
Composition = Literal["mixed", "one_class"]
Loss = Callable[[nn.Module, "Images"], Tensor]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

_NUM_CLASSES = 10
_SPLITS = ("train", "val")


# ---- images


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Pictures of one digit each.

    Args:
        pixels: [N, 1, S, S], about 0 to 1.
        labels: [N], 0 to 9.
        domain: where they come from, of `DOMAINS`.
    """

    pixels: Tensor
    labels: Tensor
    domain: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Images:
        """Some of them, in the order of the index."""
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
        self, images: Images, size: int = 64, epochs: int = 10, seed: int = 0, composition: Composition = "mixed"
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


# ---- models


class Classifier(nn.Module):
    """Convolutions, each with a norm, and a linear layer on the mean of their last feature.

    Args:
        norm: makes a norm of a number of channels.
        channels: of each convolution; every one but the first halves the picture.
        num_classes: 10 for digits.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = _NUM_CLASSES,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for number, width in enumerate(channels):
            convolution = nn.Conv2d(before, width, 3, stride=1 if number == 0 else 2, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, norm(width), nn.ReLU()))
            before = width

        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(before, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [N, classes] of pictures [N, 1, S, S]."""
        return self.head(self.backbone(pixels).mean((2, 3)))


def build_classifier(seed: int = 0, **options: Any) -> Classifier:
    """A classifier whose initial weights are those of a seed.

    Args:
        seed: of the weights.
        options: see `Classifier`.
    """
    with seeded(derive_seed(seed, Purpose.INITIALIZE)):
        return Classifier(**options)


# ---- trainings


def build_optimizer(model: nn.Module, learning_rate: float = 0.05) -> SGD:
    """SGD with momentum 0.9, without weight decay, of what the model trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SGD(trained, lr=learning_rate, momentum=0.9)


def compute_cross_entropy(model: nn.Module, batch: Images) -> Tensor:
    """The loss of a step that nobody has given another one."""
    return F.cross_entropy(model(batch.pixels), batch.labels)


def train_classifier(
    model: nn.Module,
    batches: Iterable[Images],
    *,
    num_steps: int | None = None,
    optimizer: Optimizer | None = None,
    compute_loss: Loss = compute_cross_entropy,
    around_step: Callable[[int], AbstractContextManager[Any]] | None = None,
    after_step: Callable[[nn.Module, int], object] | None = None,
    words: str = "training",
) -> list[float]:
    """Train by mini-batches, with a learning rate that falls to zero as a cosine. The mode is the caller's.

    Args:
        model: in training mode, or as its training is to have it.
        batches: one for each step, such as `Batches`.
        num_steps: how many there are; None: their length.
        optimizer: None: `build_optimizer(model)`.
        compute_loss: called as compute_loss(model, batch) with a batch of `batches`; may run the model several times.
        around_step: called as around_step(iteration), from 0, gives a scope for forward, backward and update, such as
            `TrainingWatch.step`.
        after_step: called as after_step(model, iteration) after each: an average, a validation.
        words: for its progress bar.

    Returns:
        The loss of each step.

    Note:
        The same model, batches and number of threads give the same weights, bit by bit, on a CPU.
    """
    if num_steps is None:
        num_steps = len(batches)  # type: ignore[arg-type]
    optimizer = optimizer or build_optimizer(model)
    schedule = CosineAnnealingLR(optimizer, max(num_steps, 1))

    losses = []
    for iteration, batch in enumerate(track(batches, words, num_steps, "step")):
        with contextlib.nullcontext() if around_step is None else around_step(iteration):
            loss = compute_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        schedule.step()
        losses.append(float(loss.detach()))
        if after_step is not None:
            after_step(model, iteration)
    return losses


@torch.no_grad()
def measure_accuracy(
    model: nn.Module,
    images: Images,
    batch_size: int = 256,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> float:
    """Share of the images whose class is recognized, in %; the model is as before, its running statistics, too.

    Args:
        model: in the mode in which it is to be measured.
        images: with labels.
        batch_size: images that it gets at a time, which counts where mini-batches normalize.
        forward: called as forward(model, pixels), gives scores; default model(pixels).
    """
    right = 0
    with restoring(model):
        for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
            scores = model(pixels) if forward is None else forward(model, pixels)
            right += int((scores.argmax(1) == labels).sum())
    return 100 * right / max(len(images), 1)

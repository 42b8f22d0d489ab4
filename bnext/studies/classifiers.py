"""Small classifiers that are trained in seconds, on one core, and again bit by bit by their seed; and their accuracy.

Their images are in `bnext.studies.images`. Whoever studies them composes mini-batches, a loss and what happens after a
step. Tables, and the rows of a study of detectors, are elsewhere.

Shape letters: N images, C channels, S side of a picture in pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from bnext.errors import ConfigError
from bnext.progress import track
from bnext.scope.model import restoring
from bnext.seeding import Purpose, derive_seed, seeded
from bnext.studies.images import Images, Selectable

__all__ = [
    "Classifier",
    "ResidualClassifier",
    "build_classifier",
    "build_optimizer",
    "compute_cross_entropy",
    "measure_accuracy",
    "measure_error",
    "train_classifier",
]

Loss = Callable[[nn.Module, Images], Tensor]
Norm = Callable[[int], nn.Module]

_NUM_CLASSES = 10


# ---- models


class Classifier(nn.Module):
    """Convolutions, each with a norm, and a linear layer on the mean of their last feature.

    Args:
        norm: makes a norm of a number of channels; None: there is none, and convolutions have a bias.
        channels: of each convolution; every one but the first halves the picture.
        num_classes: 10 for digits.
        in_channels: C of the pictures.
    """

    def __init__(
        self,
        norm: Norm | None = nn.BatchNorm2d,
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = _NUM_CLASSES,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for number, width in enumerate(channels):
            stride = 1 if number == 0 else 2
            layers.append(nn.Sequential(*_build_convolution(before, width, norm, stride), nn.ReLU()))
            before = width

        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(before, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [N, classes] of pictures [N, C, S, S]."""
        return self.head(self.backbone(pixels).mean((2, 3)))


class ResidualClassifier(nn.Module):
    """The residual net of CIFAR: three stages of blocks of two convolutions, and a linear layer on the mean.

    Args:
        depth: layers with weights, 6 n + 2 for n blocks in a stage: 8, 14, 20, ... 110.
        norm: makes a norm of a number of channels; None: there is none, and convolutions have a bias.
        channels: of the three stages; every one but the first halves the picture.
        num_classes: 10 for digits.
        in_channels: C of the pictures.

    Raises:
        ConfigError: there is no such depth.

    Source:
        He, Zhang, Ren and Sun, *Deep Residual Learning for Image Recognition*, 2016, section 4.2.
    """

    def __init__(
        self,
        depth: int = 20,
        norm: Norm | None = nn.BatchNorm2d,
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = _NUM_CLASSES,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if not channels:
            rule, remedy = "name a width for each stage", "Use (16, 32, 64)."
            raise ConfigError.of("channels", rule, got=channels, where="ResidualClassifier", remedy=remedy)
        blocks, rest = divmod(depth - 2, 2 * len(channels))
        if blocks < 1 or rest:
            rule = f"be 2 and a multiple of {2 * len(channels)}, for whole blocks in {len(channels)} stages"
            remedy = "Choose 8, 14, 20, 32, 44, 56 or 110 with three stages."
            raise ConfigError.of("depth", rule, got=depth, where="ResidualClassifier", remedy=remedy)

        layers: list[nn.Module] = [*_build_convolution(in_channels, channels[0], norm, stride=1), nn.ReLU()]
        before = channels[0]
        for stage, width in enumerate(channels):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(before, width, norm, stride))
                before = width

        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(before, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [N, classes] of pictures [N, C, S, S]."""
        return self.head(self.backbone(pixels).mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; where the shape changes the shortcut is a convolution of one pixel."""

    def __init__(self, before: int, width: int, norm: Norm | None, stride: int) -> None:
        super().__init__()
        first, second = _build_convolution(before, width, norm, stride), _build_convolution(width, width, norm, 1)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(*_build_convolution(before, width, norm, stride, size=1))

    def forward(self, feature: Tensor) -> Tensor:
        """[N, before, H, W] -> [N, width, H / stride, W / stride]."""
        return F.relu(self.branch(feature) + self.shortcut(feature))


def _build_convolution(before: int, width: int, norm: Norm | None, stride: int, size: int = 3) -> list[nn.Module]:
    """A convolution, and its norm if there is one."""
    convolution = nn.Conv2d(before, width, size, stride=stride, padding=size // 2, bias=norm is None)
    return [convolution] if norm is None else [convolution, norm(width)]


def build_classifier(seed: int = 0, kind: Callable[..., nn.Module] = Classifier, **options: Any) -> nn.Module:
    """A classifier whose initial weights are those of a seed.

    Args:
        seed: of the weights.
        kind: `Classifier` or `ResidualClassifier`.
        options: of the kind.
    """
    with seeded(derive_seed(seed, Purpose.INITIALIZE)):
        return kind(**options)


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
    decays: bool = True,
    compute_loss: Loss = compute_cross_entropy,
    around_step: Callable[[int], AbstractContextManager[Any]] | None = None,
    after_step: Callable[[nn.Module, int], object] | None = None,
    words: str = "training",
) -> list[float]:
    """Train by mini-batches. The mode is the caller's.

    Args:
        model: in training mode, or as its training is to have it.
        batches: one for each step, such as `Batches`.
        num_steps: how many there are; None: their length.
        optimizer: None: `build_optimizer(model)`.
        decays: whether the learning rate falls to zero as a cosine; else it stays.
        compute_loss: called as compute_loss(model, batch) with a batch of `batches`; may run the model several times.
        around_step: called as around_step(iteration), from 0, gives a scope for forward, backward and update, such as
            `TrainingWatch.step`.
        after_step: called as after_step(model, iteration) after each: an average, a validation.
        words: for its progress bar.

    Returns:
        The loss of each step; of a training that diverges some are not finite.

    Note:
        The same model, batches and number of threads give the same weights, bit by bit, on a CPU.
    """
    if num_steps is None:
        num_steps = len(batches)  # type: ignore[arg-type]
    optimizer = optimizer or build_optimizer(model)
    schedule = CosineAnnealingLR(optimizer, max(num_steps, 1)) if decays else None

    losses = []
    for iteration, batch in enumerate(track(batches, words, num_steps, "step")):
        with contextlib.nullcontext() if around_step is None else around_step(iteration):
            loss = compute_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        if schedule is not None:
            schedule.step()
        losses.append(float(loss.detach()))
        if after_step is not None:
            after_step(model, iteration)
    return losses


@torch.no_grad()
def measure_accuracy(
    model: nn.Module,
    images: Selectable,
    batch_size: int = 256,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> float:
    """Share of the images whose class is recognized, in %; the model is as before, its running statistics, too.

    Args:
        model: in the mode in which it is to be measured.
        images: with labels; on the model's device.
        batch_size: images that it gets at a time, which counts where mini-batches normalize.
        forward: called as forward(model, pixels), gives scores; default model(pixels).
    """
    right = 0
    with restoring(model):
        for index in torch.arange(len(images)).split(batch_size):
            batch = images.select(index)
            scores = model(batch.pixels) if forward is None else forward(model, batch.pixels)
            right += int((scores.argmax(1) == batch.labels).sum())
    return 100 * right / max(len(images), 1)


def measure_error(model: nn.Module, images: Selectable, batch_size: int = 256) -> float:
    """Share of the images whose class is not recognized, in %; see `measure_accuracy`."""
    return 100 - measure_accuracy(model, images, batch_size)

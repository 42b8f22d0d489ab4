"""Settings of the study, its images, and its models with and without batch norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnext.errors import ConfigError, check_choice
from bnext.seeding import Purpose, derive_seed, seeded
from bnext.studies.classifiers import ResidualClassifier, build_classifier
from bnext.studies.images import Batches, Images
from bnext.studies.setting import ImageSetting, check_counts, load_split

__all__ = ["INITIALIZATIONS", "UnderstandingSetting", "build_model", "compute_loss", "draw_batches", "load_images"]

INITIALIZATIONS = ("xavier", "kaiming", "torch")


@dataclasses.dataclass(frozen=True)
class UnderstandingSetting(ImageSetting):
    """The net, its batches, and the ranges of the figures.

    Args:
        depth, channels: of the residual net, see `ResidualClassifier`.
        trained_depth: of the one that is trained in figure 1.
        batch_size: images of a step.
        epochs: of the trainings of figure 1.
        initialization: of all figures but the second, which has every one of `INITIALIZATIONS`.
        num_batches: of the start, that a probe looks at.
        rates: learning rates of the curves of figure 1.
        drop: share of its first loss by which a training is to lower it, to count as one that trains.
        search_range: lowest and highest rate of the search.
        num_steps: of a training in the search for the highest rate.
        num_trials: of that search.
        step_sizes: of figure 3.
    """

    depth: int = 56
    trained_depth: int = 20
    channels: tuple[int, ...] = (8, 16, 32)
    batch_size: int = 64
    epochs: int = 12
    initialization: str = "xavier"
    num_batches: int = 4
    rates: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    drop: float = 0.3
    search_range: tuple[float, ...] = (0.02, 20.0)
    num_steps: int = 200
    num_trials: int = 9
    step_sizes: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("initialization", self.initialization, INITIALIZATIONS, where="settings of UnderstandingBatchNorm")
        check_counts(self, "batch_size", "epochs", "num_batches", "num_steps")

        if self.dataset == "folder":
            remedy = "Use digits, mnist or cifar10."
            raise ConfigError.of("dataset", "be a set that fits into memory", got=self.dataset, remedy=remedy)

        if len(self.search_range) != 2:
            rule, remedy = "be a lowest and a highest rate", "Use [0.02, 20]."
            raise ConfigError.of("search_range", rule, got=list(self.search_range), remedy=remedy)
        for name in ("rates", "step_sizes", "search_range"):
            if not all(value > 0 for value in getattr(self, name)):
                got = list(getattr(self, name))
                raise ConfigError.of(name, "be above 0", got=got, remedy="Give learning rates.")


def load_images(setting: UnderstandingSetting, split: str) -> Images:
    """Images of a split with mean 0 and deviation 1 over all training pixels."""
    pixels = load_split(setting, "train").pixels
    images = load_split(setting, split)
    return dataclasses.replace(images, pixels=(images.pixels - pixels.mean()) / pixels.std())


def draw_batches(setting: UnderstandingSetting, seed: int, number: int | None = None) -> Sequence[Images]:
    """Mini-batches of the start of a training."""
    batches = Batches(load_images(setting, "train"), setting.batch_size, epochs=1, seed=seed)
    return list(batches)[:number]


def build_model(setting: UnderstandingSetting, norm: bool, seed: int, initialization: str = "") -> nn.Module:
    """The residual net with a batch norm behind each convolution, or without, with the weights of a seed."""
    images = load_split(setting, "train")
    options: dict[str, Any] = {"depth": setting.depth, "channels": tuple(setting.channels)}
    options |= {"num_classes": int(images.labels.max()) + 1, "in_channels": images.pixels.shape[1]}
    model = build_classifier(seed, ResidualClassifier, norm=nn.BatchNorm2d if norm else None, **options)

    with seeded(derive_seed(seed, Purpose.INITIALIZE, 1)):
        model.apply(partial(_initialize, kind=initialization or setting.initialization))
    return model.to(setting.device).train()


@torch.no_grad()
def _initialize(module: nn.Module, kind: str) -> None:
    if kind == "torch" or not isinstance(module, nn.Conv2d | nn.Linear):
        return
    if kind == "xavier":
        nn.init.xavier_uniform_(module.weight)
    else:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def compute_loss(model: nn.Module, batch: Images) -> Tensor:
    """Cross entropy of a batch."""
    return F.cross_entropy(model(batch.pixels), batch.labels)

"""Small GANs of digits, whose discriminator has batch norm: real and generated pictures, whose batch, whose moments.

Shape letters: N pictures, S = 16 their side in pixels, F features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.progress import track
from bnext.scope import frozen_statistics, use_domain
from bnext.scope.model import restoring
from bnext.studies.classifiers import build_classifier, train_classifier
from bnext.studies.images import Batches, load_images

__all__ = ["WAYS", "GanSetting", "list_gan_trials"]

DOMAINS = ("real", "fake")
_NOISE = 16
_TRAINED_APART = NormSpec(statistics="per_domain", population="per_domain", domains=DOMAINS)
# Way -> (spec of the discriminator's norms, words).
WAYS = {
    "merged": (NormSpec(), "one batch of both"),
    "apart": (NormSpec(), "a batch of each, one moving average"),
    "update_false": (NormSpec(), "a batch of each, fake ones with update=False"),
    "domains": (_TRAINED_APART, "a batch of each, moments of each"),
    "population": (NormSpec(training="population"), "population in training"),
}


@dataclasses.dataclass(frozen=True)
class GanSetting:
    """Common settings of the GANs.

    Args:
        steps: of both nets.
        batch_size: real pictures of a step, and as many generated ones.
        learning_rate: of Adam, whose first momentum is 0.5.
    """

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 0.001

    def __post_init__(self) -> None:
        where = "settings of the GANs"
        if self.steps < 1:
            raise ConfigError.of("steps", "be 1 or more", got=self.steps, where=where, remedy="Use 400.")
        if not 2 <= self.batch_size <= 360:
            rule = "be from 2 to the 360 digits that are tested with"
            raise ConfigError.of("batch_size", rule, got=self.batch_size, where=where, remedy="Use 64.")
        if not 0 < self.learning_rate < math.inf:
            rule = "be above 0"
            raise ConfigError.of("learning_rate", rule, got=self.learning_rate, where=where, remedy="Use 0.001.")


def list_gan_trials(setting: GanSetting) -> dict[str, Callable[[int], Mapping[str, Any]]]:
    """Way of `WAYS` -> training, a function of the seed."""
    train = load_images("train")
    classifier = build_classifier(0).train()
    train_classifier(classifier, Batches(train, 64, epochs=10, seed=0), words="the classifier of features")
    classifier.eval()
    return {way: partial(_train_and_read, setting, classifier, way) for way in WAYS}


def build_generator() -> nn.Sequential:
    """Noise [N, 16] -> pictures [N, 1, 16, 16]."""
    return nn.Sequential(
        nn.Linear(_NOISE, 32 * 16),
        nn.Unflatten(1, (32, 4, 4)),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )


def build_discriminator(spec: NormSpec) -> nn.Sequential:
    """Pictures [N, 1, 16, 16] -> scores [N, 1], above 0 for real ones."""
    layers: list[nn.Module] = []
    before = 1
    for width in (16, 32, 64):
        convolution = nn.Conv2d(before, width, 3, stride=1 if before == 1 else 2, padding=1, bias=False)
        layers += [convolution, BatchNorm2d(width, spec), nn.LeakyReLU(0.2)]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 1))


def judge(discriminator: nn.Module, way: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of real and generated pictures, each [N, 1], in the batches of a way."""
    if way == "merged":
        scores = discriminator(torch.cat([real, fake]))
        return scores[: len(real)], scores[len(real) :]

    with _using("real", way):
        of_real = discriminator(real)
    unmoved = frozen_statistics(discriminator) if way == "update_false" else contextlib.nullcontext()
    with _using("fake", way), unmoved:
        return of_real, discriminator(fake)


@contextlib.contextmanager
def _using(domain: str, way: str) -> Iterator[None]:
    with use_domain(domain) if way == "domains" else contextlib.nullcontext():
        yield


def _train_and_read(setting: GanSetting, classifier: nn.Module, way: str, seed: int) -> dict[str, Any]:
    """Train a GAN, and read its discriminator by mini-batches, as in training, and by population statistics.

    Returns:
        {"as_in_training": {...}, "population": {...}}: shares of real, fake and all pictures that are told right, in %;
        "score_change": mean difference of scores between both readings, in deviations of the former; "distance": of
        generated pictures from training pictures, see `measure_distance`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = build_generator(), build_discriminator(WAYS[way][0])
        _train(setting, generator, discriminator, way, seed)

        with torch.no_grad():
            fake = torch.cat([generator(torch.randn(64, _NOISE)) for _ in range(23)])  # as many as training pictures
    distance = measure_distance(classifier, fake, load_images("train").pixels)
    return {**_read(setting, discriminator, way, fake), "distance": distance}


def _train(setting: GanSetting, generator: nn.Module, discriminator: nn.Module, way: str, seed: int) -> None:
    train, size = load_images("train"), setting.batch_size
    per_epoch = len(train) // size
    batches = iter(Batches(train, size, epochs=setting.steps // per_epoch + 1, seed=seed))
    options: dict[str, Any] = {"lr": setting.learning_rate, "betas": (0.5, 0.999)}
    of_generator = Adam(generator.parameters(), **options)
    of_discriminator = Adam(discriminator.parameters(), **options)

    for _ in track(range(setting.steps), "GAN", setting.steps, "step"):
        real = next(batches).pixels
        scores, of_fake = judge(discriminator, way, real, generator(torch.randn(size, _NOISE)).detach())
        loss = _ask(scores, 1) + _ask(of_fake, 0)
        of_discriminator.zero_grad()
        loss.backward()
        of_discriminator.step()

        with frozen_statistics(discriminator):  # pictures that are never shown to it as what they are
            _, of_fake = judge(discriminator, way, real, generator(torch.randn(size, _NOISE)))
        loss = _ask(of_fake, 1)
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()


def _ask(scores: Tensor, answer: int) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, answer))


@torch.no_grad()
def _read(setting: GanSetting, discriminator: nn.Module, way: str, fake: Tensor) -> dict[str, Any]:
    real = load_images("val").pixels
    number = len(real) // setting.batch_size * setting.batch_size
    scores, results = {}, {}

    for reading in ("as_in_training", "population"):
        parts = []
        with restoring(discriminator), frozen_statistics(discriminator):
            discriminator.train(reading == "as_in_training")
            for start in range(0, number, setting.batch_size):
                stop = start + setting.batch_size
                parts.append(torch.stack(judge(discriminator, way, real[start:stop], fake[start:stop])))
        of_real, of_fake = torch.cat(parts, 1).flatten(1)
        scores[reading] = torch.cat([of_real, of_fake])

        shares = [100 * float((of_real > 0).float().mean()), 100 * float((of_fake < 0).float().mean())]
        results[reading] = {"real": shares[0], "fake": shares[1], "all": sum(shares) / 2}

    change = (scores["population"] - scores["as_in_training"]).abs().mean() / scores["as_in_training"].std()
    return {**results, "score_change": float(change)}


@torch.no_grad()
def measure_distance(classifier: Any, pictures: Tensor, others: Tensor) -> float:
    """Frechet distance of two sets of pictures in the features of a classifier of digits.

        |m - m'|^2 + trace(C + C' - 2 (C C')^(1/2)),  m and C the mean and covariance of features

    Args:
        classifier: a trained `Classifier`, in evaluation mode.
        pictures, others: [N, 1, S, S].

    Source:
        Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*, 2017; there
        the features are those of an Inception net.
    """
    features = [classifier.backbone(each).mean((2, 3)).double().numpy() for each in (pictures, others)]
    difference = features[0].mean(0) - features[1].mean(0)
    spread, other = (np.cov(each.T) for each in features)

    values, vectors = np.linalg.eigh(spread)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()  # also where a feature is always zero
    return float(np.square(difference).sum() + np.trace(spread + other) - 2 * common)

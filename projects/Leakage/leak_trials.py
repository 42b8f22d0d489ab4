"""Trainings of the study: which mini-batches, which repair, what is measured; their names in results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import fmean
from typing import Any

import torch
from leak_setting import LeakSetting, parse_pattern
from torch import nn
from torchvision.models import resnet50

from bnext.layers import NormSpec, deal_statistics
from bnext.layers.build import build_norm
from bnext.layers.walk import find_bnext_norms
from bnext.scope.statistics import answering
from bnext.seeding import Purpose, derive_seed
from bnext.statistics import recompute_population_statistics
from bnext.studies.classifiers import (
    Classifier,
    ResidualClassifier,
    build_classifier,
    build_optimizer,
    measure_error,
    train_classifier,
)
from bnext.studies.images import Images, Selectable
from bnext.studies.patterns import Pattern, PatternedBatches, join_images
from bnext.studies.setting import load_split

__all__ = ["REPAIRS", "Training", "list_axes", "list_trials", "load_sets"]

# Repair -> in words.
REPAIRS = {
    "random_groups": "Ghost BN of random groups",
    "dealt": "dealt statistics",
    "all": "one batch of all groups, as SyncBN",
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of the study.

    Args:
        pattern: of its normalization batches.
        num_steps, noise: of the training.
        joined: digits on a picture.
        repair: of `REPAIRS`, or "": none.
    """

    pattern: Pattern
    num_steps: int
    noise: float
    joined: int = 1
    repair: str = ""

    @property
    def name(self) -> str:
        """Its name in results.json."""
        words = f"{self.pattern}, share {self.pattern.share:g}, {self.num_steps} steps, noise {self.noise:g}"
        words += f", {self.joined} digits" if self.joined > 1 else ""
        return f"{words}, {self.repair}" if self.repair else words


def list_axes(setting: LeakSetting) -> dict[str, dict[str, Training]]:
    """Axis -> label -> training. A training may be on several axes."""
    main = Training(parse_pattern(setting.pattern), setting.num_steps, setting.noise)
    iid = dataclasses.replace(main, pattern=parse_pattern(setting.pattern, share=0.0))

    patterns = {"i.i.d.": iid}
    for words in setting.patterns:
        patterns[words] = dataclasses.replace(main, pattern=parse_pattern(words))

    repairs = {"none": main}
    for repair, words in REPAIRS.items():
        repairs[words] = dataclasses.replace(main, repair=repair)

    joined: dict[str, Training] = {}
    for words in setting.joined_patterns:
        for label, share in (("i.i.d.", 0.0), (words, 1.0)):
            pattern = parse_pattern(words, share)
            joined[label] = Training(pattern, setting.joined_steps, setting.noise, setting.joined)

    shares = {f"{share:g}": parse_pattern(setting.pattern, share) for share in setting.shares}
    return {
        "pattern": patterns,
        "repair": repairs,
        "length": {str(steps): dataclasses.replace(main, num_steps=steps) for steps in setting.lengths},
        "share": {label: dataclasses.replace(main, pattern=pattern) for label, pattern in shares.items()},
        "noise": {f"{noise:g}": dataclasses.replace(main, noise=noise) for noise in setting.noises},
        "joined": joined,
    }


Sets = dict[str, Selectable]


def load_sets(setting: LeakSetting) -> Sets:
    """Split -> images."""
    return {split: load_split(setting, split) for split in ("train", "val")}


def list_trials(setting: LeakSetting, sets: Sets) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Name of a training -> function of the seed; each training once.

    Raises:
        ConfigError: a pattern asks for more classes, or images of one, than the set has.
    """
    trials = {}
    for trainings in list_axes(setting).values():
        for training in trainings.values():
            if training.joined == 1:
                for images in sets.values():
                    PatternedBatches(images, training.pattern)  # which refuses what it cannot draw
            trials[training.name] = partial(run_training, setting, training, sets)
    return trials


def run_training(setting: LeakSetting, training: Training, sets: Sets, seed: int) -> dict[str, Any]:
    """Train a classifier, and measure its errors in %.

    Returns:
        loss: mean of the last 20 steps; error: of validation images by mini-batches of the same pattern ("same"), by
        random ones ("random"), by population statistics ("population").
    """
    if training.joined > 1:
        count = setting.joined_count
        sets = {split: join_images(images, training.joined, count, seed) for split, images in sets.items()}
    options: dict[str, Any] = {"noise": training.noise, "num_groups": setting.num_groups}
    options["shuffled"] = training.repair == "random_groups"
    batches = PatternedBatches(
        sets["train"], training.pattern, num_steps=training.num_steps, seed=derive_seed(seed, Purpose.ORDER), **options
    )
    more = PatternedBatches(
        sets["train"],
        training.pattern,
        num_steps=setting.num_statistics,
        seed=derive_seed(seed, Purpose.REESTIMATE),
        **options,
    )

    model = _build_model(setting, training, sets["train"], seed)
    optimizer = build_optimizer(model, setting.learning_rate)
    losses = train_classifier(model, _move(batches, setting), num_steps=len(batches), optimizer=optimizer)
    pixels = (batch.pixels for batch in _move(more, setting))
    recompute_population_statistics(model, pixels, seed=seed)

    tests = {"same": training.pattern, "random": dataclasses.replace(training.pattern, share=0.0)}
    errors = {}
    with answering(find_bnext_norms(model).values(), inference="mini_batch"):
        for name, pattern in tests.items():
            errors[name] = _measure(model, setting, training, sets["val"], pattern, seed)
    errors["population"] = _measure(model, setting, training, sets["val"], tests["random"], seed)
    return {"loss": fmean(losses[-20:]), "error": errors}


def _build_model(setting: LeakSetting, training: Training, images: Selectable, seed: int) -> nn.Module:
    """A classifier in training mode whose norms are normalized as the training says."""
    size = None if training.repair in ("dealt", "all") else training.pattern.normalization_batch_size
    options: dict[str, Any] = {"norm": build_norm(NormSpec(normalization_batch_size=size))}
    options["num_classes"] = int(images.labels.max()) + 1
    if setting.model == "resnet50":
        options["norm_layer"] = options.pop("norm")
        model = build_classifier(seed, kind=resnet50, **options)
    else:
        options["channels"] = setting.channels
        options["in_channels"] = images.select(torch.tensor([0])).pixels.shape[1]
        kind = partial(ResidualClassifier, setting.depth) if setting.model == "residual" else Classifier
        model = build_classifier(seed, kind=kind, **options)

    if training.repair == "dealt":
        deal_statistics(model, setting.num_groups)
    return model.to(setting.device).train()


def _move(batches: Iterable[Images], setting: LeakSetting) -> Iterator[Images]:
    return (batch.to(setting.device) for batch in batches)


def _measure(
    model: nn.Module, setting: LeakSetting, training: Training, images: Selectable, pattern: Pattern, seed: int
) -> float:
    """Mean error of normalization batches of validation images, each evaluated by itself."""
    model.eval()
    batches = PatternedBatches(
        images, pattern, num_steps=setting.num_tests, seed=derive_seed(seed, Purpose.VALIDATE), noise=training.noise
    )
    return fmean(measure_error(model, batch, len(batch)) for batch in _move(batches, setting))

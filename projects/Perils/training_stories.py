"""Bugs of who writes running statistics: a frozen backbone, a validation, a recomputation, an average of weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from perils import Extent, Outcome, Story, follow_remedy
from small_trainings import ACCURACY, load_digits, take_pixels, train_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.diagnostics import Diagnosis, TrainingWatch
from bnext.studies.classifiers import (
    Classifier,
    build_classifier,
    compute_cross_entropy,
    measure_accuracy,
    train_classifier,
)
from bnext.studies.images import Batches, Images

__all__ = ["TRAINING_STORIES"]

_WATCHED = 3  # steps, after the training, whose updates are counted


# ---- frozen parameters, live statistics


def tell_frozen_parameters(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A head for another domain is trained on a backbone whose parameters alone are frozen."""
    (scans, scans_val), (photographs, photographs_val) = load_digits(extent), load_digits(extent, "photographs")
    trained = train_model(build_classifier(seed), scans, extent, seed)
    without = measure_accuracy(trained, scans_val)
    head = copy.deepcopy(trained.head)

    def fine_tune(model: Classifier) -> tuple[float, float]:
        """Accuracy with the old head on the old domain, with the new head on the new one."""
        train_model(model, photographs, extent, seed)
        new = measure_accuracy(model, photographs_val)
        model.head = head
        return measure_accuracy(model, scans_val), new

    model = copy.deepcopy(trained).train()
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False
    data = take_pixels(Batches(photographs, seed=seed))
    diagnosis = bnext.diagnose(model, data)

    frozen = copy.deepcopy(model)
    follow_remedy(diagnosis, model=frozen)
    again = bnext.diagnose(frozen, data)

    (before, new_before), (after, new_after) = fine_tune(model), fine_tune(frozen)
    more = {"new domain, with the bug": new_before, "new domain, after the remedy": new_after}
    return Outcome(before, after, without, diagnosis, again, more)


# ---- statistics that a training does not write, or writes twice


def _watch(model: nn.Module, batches: Iterable[Images], **options: object) -> Diagnosis:
    """The diagnosis of a few more steps of a copy of the model."""
    model = copy.deepcopy(model).train()
    watch = TrainingWatch(model)
    few = list(itertools.islice(batches, _WATCHED))
    train_classifier(model, few, around_step=watch.step, **options)
    return watch.diagnose()


def tell_validation_loss(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A validation loss, between steps, of images of another domain; the model stays in training mode for it."""
    (train, val), (others, _) = load_digits(extent), load_digits(extent, "negatives")
    batches = Batches(train, epochs=extent.epochs, seed=seed)

    def validate(model: nn.Module, iteration: int) -> None:
        with torch.no_grad():
            compute_cross_entropy(model, others.select(torch.arange(min(64, len(others)))))

    def validate_apart(model: nn.Module, iteration: int) -> None:
        with bnext.frozen_statistics(model):  # the remedy
            validate(model, iteration)

    model = train_model(build_classifier(seed), train, extent, seed, after_step=validate)
    repaired = train_model(build_classifier(seed), train, extent, seed, after_step=validate_apart)
    without = measure_accuracy(train_model(build_classifier(seed), train, extent, seed), val)

    diagnosis = _watch(model, batches, after_step=validate)
    again = _watch(repaired, batches, after_step=validate_apart)
    return Outcome(measure_accuracy(model, val), measure_accuracy(repaired, val), without, diagnosis, again)


class CheckpointedClassifier(Classifier):
    """A classifier whose backward pass runs the convolutions and their norms once more, to save memory."""

    def forward(self, pixels: Tensor) -> Tensor:
        feature = checkpoint(self.backbone, pixels, use_reentrant=False)
        return self.head(feature.mean((2, 3)))


def tell_checkpointing(seed: int, extent: Extent, folder: Path) -> Outcome:
    """Activation checkpointing of torch's norms."""
    train, val = load_digits(extent)
    batches = Batches(train, epochs=extent.epochs, seed=seed)

    def build() -> CheckpointedClassifier:
        model = CheckpointedClassifier()
        model.load_state_dict(build_classifier(seed).state_dict())
        return model

    model, repaired = train_model(build(), train, extent, seed), build()
    diagnosis = _watch(model, batches)
    follow_remedy(diagnosis, model=repaired)
    train_model(repaired, train, extent, seed)
    again = _watch(repaired, batches)

    without = measure_accuracy(train_model(build_classifier(seed), train, extent, seed), val)
    return Outcome(measure_accuracy(model, val), measure_accuracy(repaired, val), without, diagnosis, again)


# ---- averaged weights


def tell_averaged_weights(seed: int, extent: Extent, folder: Path) -> Outcome:
    """An average of the parameters, in a copy of the model whose buffers nobody has looked at."""
    train, val = load_digits(extent)
    model = build_classifier(seed)
    teacher, average = copy.deepcopy(model).eval(), bnext.AveragedWeights(model, decay=0.98)

    @torch.no_grad()
    def update(model: nn.Module, iteration: int) -> None:
        decay = min(0.98, (1 + iteration) / (10 + iteration))  # that of AveragedWeights
        for averaged, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
            averaged.lerp_(parameter, 1 - decay)
        average.update(model)

    train_model(model, train, extent, seed, after_step=update)
    without = measure_accuracy(model, val)
    with average.lent_to(model):
        more = {"bnext.AveragedWeights": measure_accuracy(model, val)}

    data = take_pixels(Batches(train, seed=seed, epochs=1), 20)
    diagnosis = bnext.diagnose(model.train(), data, averaged=teacher)
    before = measure_accuracy(teacher, val)
    follow_remedy(diagnosis, model=model, averaged=teacher, data=data)
    again = bnext.diagnose(model, data, averaged=teacher)
    return Outcome(before, measure_accuracy(teacher.eval(), val), without, diagnosis, again, more)


TRAINING_STORIES = {
    "frozen_parameters": Story(
        "fine-tuning with requires_grad=False", "BN004", f"{ACCURACY}, old task", tell_frozen_parameters
    ),
    "validation_loss": Story("a validation loss in training mode", "BN025", ACCURACY, tell_validation_loss),
    "checkpointing": Story("activation checkpointing of torch's norms", "BN015", ACCURACY, tell_checkpointing),
    "averaged_weights": Story("an average of parameters, without buffers", "BN026", ACCURACY, tell_averaged_weights),
}

"""Bugs of classifiers: each as users write it, what the doctor says of it, and its remedy, applied."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from perils import Extent, Outcome, Story
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.diagnostics import TrainingWatch
from bnext.studies.classifiers import (
    Batches,
    Classifier,
    Images,
    build_classifier,
    compute_cross_entropy,
    load_images,
    measure_accuracy,
    train_classifier,
)

__all__ = ["CLASSIFIER_STORIES"]

_WATCHED = 3  # steps, after the training, whose updates are counted
_GROUPS, _GROUP_SIZE = 4, 16  # groups of like images in a step: the workers of a detector, and the RoIs of an image


def _load(extent: Extent, domain: str = "scans") -> tuple[Images, Images]:
    """Images for training and for test."""
    options = {"domain": domain, "limit": extent.images}
    return load_images("train", **options), load_images("val", **options)


def _train(model: nn.Module, images: Images, extent: Extent, seed: int, **options: object) -> nn.Module:
    """The model, trained, in evaluation mode."""
    train_classifier(model.train(), Batches(images, epochs=extent.epochs, seed=seed), **options)
    return model.eval()


def _take(batches: Iterable[Images], number: int = 4) -> list[Tensor]:
    """Pixels of the first batches: the data that the doctor gets."""
    return [batch.pixels for batch in itertools.islice(batches, number)]


# ---- train mode, one picture at a time


class HandwrittenNorm(nn.BatchNorm2d):
    """A batch norm as tutorials write it: where torch's own refuses a single element, it gives zeros."""

    def forward(self, feature: Tensor) -> Tensor:
        if not self.training:
            return super().forward(feature)

        mean, var = feature.mean((0, 2, 3)), feature.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (var + self.eps).sqrt()
        return (feature - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def tell_train_mode(seed: int, extent: Extent, folder: Path) -> Outcome:
    """`model.eval()` was forgotten, and pictures are classified one by one."""
    train, val = _load(extent)
    model = build_classifier(seed, norm=HandwrittenNorm, channels=(16, 32, 64, 64, 64))
    without = measure_accuracy(_train(model, train, extent, seed), val)

    model.train()
    pictures = _take(Batches(train, size=1, seed=seed))
    diagnosis = bnext.diagnose(model, pictures)
    before = measure_accuracy(model, val, batch_size=1)
    by_two = measure_accuracy(model, val, batch_size=2)

    model.eval()
    again = bnext.diagnose(model, pictures)
    after = measure_accuracy(model, val, batch_size=1)
    return Outcome(before, after, without, diagnosis, again, {"two pictures at a time": by_two})


# ---- frozen parameters, live statistics


def tell_frozen_parameters(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A head for another domain is trained on a backbone whose parameters alone are frozen."""
    (scans, scans_val), (photographs, photographs_val) = _load(extent), _load(extent, "photographs")
    trained = _train(build_classifier(seed), scans, extent, seed)
    without = measure_accuracy(trained, scans_val)
    head = copy.deepcopy(trained.head)

    def fine_tune(model: Classifier) -> tuple[float, float]:
        """Accuracy with the old head on the old domain, with the new head on the new one."""
        _train(model, photographs, extent, seed)
        new = measure_accuracy(model, photographs_val)
        model.head = head
        return measure_accuracy(model, scans_val), new

    model = copy.deepcopy(trained).train()
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False
    data = _take(Batches(photographs, seed=seed))
    diagnosis = bnext.diagnose(model, data)

    frozen = copy.deepcopy(model)
    bnext.freeze_norms(frozen)  # the remedy
    again = bnext.diagnose(frozen, data)

    (before, new_before), (after, new_after) = fine_tune(model), fine_tune(frozen)
    more = {"new domain, with the bug": new_before, "new domain, after the remedy": new_after}
    return Outcome(before, after, without, diagnosis, again, more)


# ---- two domains


def _train_on_two(model: nn.Module, pairs: list[dict[str, Images]], **options: object) -> nn.Module:
    train_classifier(model.train(), pairs, **options)
    return model.eval()


def _add_losses(model: nn.Module, pair: dict[str, Images]) -> Tensor:
    """A batch of each domain through the shared weights."""
    return sum(compute_cross_entropy(model, batch) for batch in pair.values())


def _add_losses_by_domain(model: nn.Module, pair: dict[str, Images]) -> Tensor:
    losses = []
    for domain, batch in pair.items():
        with bnext.use_domain(domain):
            losses.append(compute_cross_entropy(model, batch))
    return sum(losses)


def _merge_pair(model: nn.Module, pair: dict[str, Images]) -> Tensor:
    """One batch of both domains."""
    pixels, labels = (torch.cat(parts) for parts in zip(*((b.pixels, b.labels) for b in pair.values()), strict=True))
    return F.cross_entropy(model(pixels), labels)


def tell_two_domains(seed: int, extent: Extent, folder: Path) -> Outcome:
    """Each step runs a batch of each of two domains; both write into the same moving averages."""
    domains = ("scans", "negatives")
    loaded = {domain: _load(extent, domain) for domain in domains}
    batches = []
    for number, (train, _) in enumerate(loaded.values()):
        batches.append(Batches(train, size=32, epochs=extent.epochs, seed=2 * seed + number))
    pairs = [dict(zip(domains, pair, strict=True)) for pair in zip(*batches, strict=True)]

    def measure(model: nn.Module, knows_domains: bool = False) -> float:
        """Mean of both domains."""
        accuracies = []
        for domain, (_, val) in loaded.items():
            if knows_domains:
                with bnext.use_domain(domain):
                    accuracies.append(measure_accuracy(model, val))
            else:
                accuracies.append(measure_accuracy(model, val))
        return fmean(accuracies)

    data = {domain: [pair[domain].pixels for pair in pairs[:4]] for domain in domains}
    model = _train_on_two(build_classifier(seed), pairs, compute_loss=_add_losses)
    diagnosis = bnext.diagnose(model.train(), domains=data)
    before = measure(model.eval())

    spec = bnext.NormSpec(statistics="per_domain", population="per_domain", domains=domains)  # the remedy
    repaired = build_classifier(seed)
    bnext.convert_norm(repaired, {"": spec})
    _train_on_two(repaired, pairs, compute_loss=_add_losses_by_domain)
    again = bnext.diagnose(repaired.train(), domains=data)
    after = measure(repaired.eval(), knows_domains=True)

    merged = measure(_train_on_two(build_classifier(seed), pairs, compute_loss=_merge_pair))
    return Outcome(before, after, None, diagnosis, again, {"one batch of both": merged})


# ---- a head on several scales


class MultiScaleClassifier(Classifier):
    """A head of convolutions and norms that is called on every scale; each scale answers for itself, as in a detector.

    Args:
        norm: of backbone and head.
    """

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__(norm)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, 32, 1) for channels in (16, 32, 64))
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.head = nn.Linear(32, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [scales, N, 10]."""
        feature, scores = pixels, []
        for block, lateral in zip(self.backbone, self.laterals, strict=True):
            feature = block(feature)
            scores.append(self.head(self.shared(lateral(feature)).mean((2, 3))))
        return torch.stack(scores)


def _add_losses_of_scales(model: nn.Module, batch: Images) -> Tensor:
    return sum(F.cross_entropy(scores, batch.labels) for scores in model(batch.pixels))


def _measure_scales(model: nn.Module, images: Images) -> list[float]:
    """Accuracy of each scale's answers, from the largest feature to the smallest."""
    return [measure_accuracy(model, images, forward=lambda *args, k=k: args[0](args[1])[k]) for k in range(3)]


def tell_shared_head(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A plain norm in a head that is called on three scales: row 3, in small."""
    train, val = _load(extent)
    torch.manual_seed(seed)
    model = _train(MultiScaleClassifier(), train, extent, seed, compute_loss=_add_losses_of_scales)

    data = _take(Batches(train, seed=seed, epochs=1), 20)
    diagnosis = bnext.diagnose(model.train(), data)
    before = _measure_scales(model.eval(), val)

    bnext.repair(model, data)  # the remedy
    again = bnext.diagnose(model.train(), data)
    after = _measure_scales(model.eval(), val)

    more = {f"scale {scale}, with the bug": accuracy for scale, accuracy in enumerate(before, 1)}
    more |= {f"scale {scale}, after the remedy": accuracy for scale, accuracy in enumerate(after, 1)}
    return Outcome(fmean(before), fmean(after), None, diagnosis, again, more)


# ---- mini-batches of images that resemble one another


def _add_losses_of_groups(model: nn.Module, groups: list[Images]) -> Tensor:
    """Every group is a mini-batch of its own, as that of a worker with one image."""
    return sum(compute_cross_entropy(model, group) for group in groups) / len(groups)


def _deal_groups(model: nn.Module, groups: list[Images]) -> Tensor:
    """All images at once; whose statistics normalize which of them is up to `deal_statistics`."""
    pixels, labels = torch.cat([group.pixels for group in groups]), torch.cat([group.labels for group in groups])
    return F.cross_entropy(model(pixels), labels)


def tell_correlated(seed: int, extent: Extent, folder: Path) -> Outcome:
    """The 16 images of a mini-batch are of one class, as the RoIs of an image are of few."""
    train, val = _load(extent)

    def compose(composition: str) -> list[list[Images]]:
        """Groups of images, four for each step."""
        options = {"epochs": extent.epochs, "seed": seed, "composition": composition}
        groups = list(Batches(train, _GROUP_SIZE, **options))
        return [groups[start : start + _GROUPS] for start in range(0, len(groups) - _GROUPS + 1, _GROUPS)]

    like, mixed = compose("one_class"), compose("mixed")
    model = build_classifier(seed).train()
    train_classifier(model, like, compute_loss=_add_losses_of_groups)
    data = [group.pixels for group in itertools.chain(*like[:4])]
    diagnosis = bnext.diagnose(model, data, num_batches=len(data))
    before = measure_accuracy(model.eval(), val)

    repaired = build_classifier(seed).train()
    train_classifier(repaired, mixed, compute_loss=_add_losses_of_groups)  # the remedy
    data = [group.pixels for group in itertools.chain(*mixed[:4])]
    again = bnext.diagnose(repaired, data, num_batches=len(data))
    after = measure_accuracy(repaired.eval(), val)

    dealt = build_classifier(seed, norm=bnext.BatchNorm2d).train()
    bnext.deal_statistics(dealt.backbone, num_groups=_GROUPS)
    train_classifier(dealt, like, compute_loss=_deal_groups)
    more = {"the same images, dealt statistics": measure_accuracy(dealt.eval(), val)}
    return Outcome(before, after, None, diagnosis, again, more)


# ---- statistics that are updated twice in a step


def _watch(model: nn.Module, batches: Batches, compute_loss: object) -> bnext.diagnostics.Diagnosis:
    """What the doctor says of a few steps; the model is a copy."""
    model = copy.deepcopy(model).train()
    watch = TrainingWatch(model)
    few = list(itertools.islice(batches, _WATCHED))
    train_classifier(model, few, compute_loss=compute_loss, around_step=watch.step)
    return watch.diagnose()


def tell_second_forward(seed: int, extent: Extent, folder: Path) -> Outcome:
    """Each step also computes the loss of another domain, to be shown, and the model stays in training mode for it."""
    (train, val), (others, _) = _load(extent), _load(extent, "negatives")
    batches = Batches(train, epochs=extent.epochs, seed=seed)

    def compute_both(model: nn.Module, batch: Images, is_guarded: bool, stream: Iterator[Images]) -> Tensor:
        loss = compute_cross_entropy(model, batch)
        shown = next(stream)
        with torch.no_grad():
            if not is_guarded:
                compute_cross_entropy(model, shown)
                return loss
            with bnext.frozen_statistics(model):  # the remedy
                compute_cross_entropy(model, shown)
        return loss

    numbers, diagnoses = [], []
    for is_guarded in (False, True):
        stream = itertools.cycle(Batches(others, epochs=1, seed=seed))
        compute_loss = partial(compute_both, is_guarded=is_guarded, stream=stream)
        model = _train(build_classifier(seed), train, extent, seed, compute_loss=compute_loss)
        numbers.append(measure_accuracy(model, val))
        diagnoses.append(_watch(model, batches, compute_loss))

    without = measure_accuracy(_train(build_classifier(seed), train, extent, seed), val)
    return Outcome(*numbers, without, *diagnoses)


def _compute_with_checkpoint(model: nn.Module, batch: Images) -> Tensor:
    """The backward pass runs the backbone, and its norms, once more."""
    feature = checkpoint(model.backbone, batch.pixels, use_reentrant=False)
    return F.cross_entropy(model.head(feature.mean((2, 3))), batch.labels)


def tell_checkpointing(seed: int, extent: Extent, folder: Path) -> Outcome:
    """Activation checkpointing of torch's norms."""
    train, val = _load(extent)
    batches = Batches(train, epochs=extent.epochs, seed=seed)
    model = _train(build_classifier(seed), train, extent, seed, compute_loss=_compute_with_checkpoint)
    diagnosis = _watch(model, batches, _compute_with_checkpoint)

    repaired = build_classifier(seed)
    bnext.convert_norm(repaired, {"": bnext.NormSpec()})  # the remedy
    _train(repaired, train, extent, seed, compute_loss=_compute_with_checkpoint)
    again = _watch(repaired, batches, _compute_with_checkpoint)

    without = measure_accuracy(_train(build_classifier(seed), train, extent, seed), val)
    return Outcome(measure_accuracy(model, val), measure_accuracy(repaired, val), without, diagnosis, again)


# ---- averaged weights


def tell_averaged_weights(seed: int, extent: Extent, folder: Path) -> Outcome:
    """An average of the parameters, in a copy of the model whose buffers nobody has looked at."""
    train, val = _load(extent)
    model = build_classifier(seed)
    teacher = copy.deepcopy(model).eval()
    average = bnext.AveragedWeights(model, decay=0.98)  # the remedy

    @torch.no_grad()
    def update(model: nn.Module, iteration: int) -> None:
        decay = min(0.98, (1 + iteration) / (10 + iteration))  # that of AveragedWeights
        for averaged, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
            averaged.lerp_(parameter, 1 - decay)
        average.update(model)

    _train(model, train, extent, seed, after_step=update)
    data = _take(Batches(train, seed=seed))
    diagnosis = bnext.diagnose(model.train(), data, averaged=teacher)
    before, without = measure_accuracy(teacher, val), measure_accuracy(model.eval(), val)

    with average.lent_to(model):
        averaged = copy.deepcopy(model)
    again = bnext.diagnose(model.train(), data, averaged=averaged)
    return Outcome(before, measure_accuracy(averaged, val), without, diagnosis, again)


_ACCURACY = "accuracy, %"
CLASSIFIER_STORIES = {
    "train_mode": Story("classifying one picture at a time in training mode", "BN010", _ACCURACY, tell_train_mode),
    "frozen_parameters": Story(
        "fine-tuning a head on a backbone with requires_grad=False",
        "BN004",
        f"{_ACCURACY}, old task",
        tell_frozen_parameters,
    ),
    "two_domains": Story(
        "a batch of each domain, moving averages of both", "BN023", f"{_ACCURACY}, mean of domains", tell_two_domains
    ),
    "shared_head": Story(
        "a plain norm in a head that sees three scales", "BN001", f"{_ACCURACY}, mean of scales", tell_shared_head
    ),
    "correlated": Story("mini-batches of one class", "BN003", _ACCURACY, tell_correlated),
    "second_forward": Story("a loss to be shown, in training mode", "BN015", _ACCURACY, tell_second_forward),
    "checkpointing": Story("activation checkpointing of torch's norms", "BN015", _ACCURACY, tell_checkpointing),
    "averaged_weights": Story("an average of parameters, without buffers", "BN026", _ACCURACY, tell_averaged_weights),
}

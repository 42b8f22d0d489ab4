"""Bugs of what is normalized together: single pictures, domains, scales, and the digits of one page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from perils import Extent, Outcome, Story, follow_remedy
from small_trainings import ACCURACY, load_digits, take_pixels, train_model
from torch import Tensor, nn

import bnext
from bnext.studies.classifiers import (
    Classifier,
    build_classifier,
    build_optimizer,
    compute_cross_entropy,
    measure_accuracy,
    train_classifier,
)
from bnext.studies.images import Batches, Images

__all__ = ["MINI_BATCH_STORIES"]

_PAGE, _PAGES = 16, 4  # digits of a page, as RoIs of an image; pages of a step, each on a worker


# ---- training mode, one picture at a time


def tell_train_mode(seed: int, extent: Extent, folder: Path) -> Outcome:
    """`model.eval()` was forgotten, and pictures are classified one by one."""
    train, val = load_digits(extent)
    model = train_model(build_classifier(seed), train, extent, seed)
    without = measure_accuracy(model, val)

    model.train()
    pictures = take_pixels(Batches(train, size=1, seed=seed))
    diagnosis = bnext.diagnose(model, pictures)
    before, by_two = measure_accuracy(model, val, batch_size=1), measure_accuracy(model, val, batch_size=2)

    follow_remedy(diagnosis, model=model)
    again = bnext.diagnose(model, pictures)
    after = measure_accuracy(model, val, batch_size=1)
    return Outcome(before, after, without, diagnosis, again, {"two pictures at a time": by_two})


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


def tell_single_element(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A training by single pictures, whose last feature is one pixel: the norm there gives zeros."""
    train, val = load_digits(extent)
    train = train.select(torch.arange(min(len(train), 400)))
    batches = Batches(train, size=1, epochs=max(1, extent.epochs // 3), seed=seed)
    data = take_pixels(batches)

    def build(norm: Callable[[int], nn.Module]) -> Classifier:
        return build_classifier(seed, norm=norm, channels=(16, 32, 64, 64, 64)).train()

    def measure(model: nn.Module) -> float:
        """After a training, in its mode: the mini-batches of the test are those of the training."""
        train_classifier(model, batches, optimizer=build_optimizer(model, learning_rate=0.005))
        return measure_accuracy(model, val, batch_size=1)

    model = build(HandwrittenNorm)
    diagnosis = bnext.diagnose(model, data)
    repaired = build(partial(nn.GroupNorm, 8))  # the remedy, by hand: no line can say what a handwritten norm becomes
    again = bnext.diagnose(repaired, data)
    return Outcome(measure(model), measure(repaired), None, diagnosis, again)


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
    loaded = {domain: load_digits(extent, domain) for domain in domains}
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

    repaired = build_classifier(seed)
    follow_remedy(diagnosis, model=repaired)
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
    accuracies = []
    for scale in range(len(model.laterals)):
        accuracies.append(measure_accuracy(model, images, forward=partial(_score_scale, scale=scale)))
    return accuracies


def _score_scale(model: nn.Module, pixels: Tensor, scale: int) -> Tensor:
    return model(pixels)[scale]


def tell_shared_head(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A plain norm in a head that is called on three scales: row 3, in small."""
    train, val = load_digits(extent)
    model = train_model(MultiScaleClassifier(), train, extent, seed, compute_loss=_add_losses_of_scales)

    data = take_pixels(Batches(train, seed=seed, epochs=1), 20)
    diagnosis = bnext.diagnose(model.train(), data)
    before = _measure_scales(model.eval(), val)

    follow_remedy(diagnosis, model=model, data=data)
    again = bnext.diagnose(model.train(), data)
    after = _measure_scales(model.eval(), val)

    more = {f"scale {scale}, with the bug": accuracy for scale, accuracy in enumerate(before, 1)}
    more |= {f"scale {scale}, after the remedy": accuracy for scale, accuracy in enumerate(after, 1)}
    return Outcome(fmean(before), fmean(after), None, diagnosis, again, more)


# ---- mini-batches of RoIs of one image


class PageReader(nn.Module):
    """A classifier of the digits on pages, 16 on each, as a box head is one of the RoIs of images."""

    def __init__(self, seed: int, **options: object) -> None:
        super().__init__()
        self.classifier = build_classifier(seed, **options)

    def forward(self, pages: Tensor) -> Tensor:
        """Scores [pages * 16, 10] of pages [N, 1, 16 * S, S]: their digits stand below one another."""
        side = pages.shape[-1]
        return self.classifier(pages.unflatten(2, (-1, side)).transpose(1, 2).flatten(0, 1))


def _print_pages(digits: Images) -> Images:
    """Digits on pages, 16 on each; labels [N, 16]."""
    count, side = len(digits) // _PAGE * _PAGE, digits.pixels.shape[-1]
    pixels = digits.pixels[:count].reshape(-1, _PAGE * side, side)
    return Images(pixels[:, None], digits.labels[:count].reshape(-1, _PAGE), digits.domain)


def _add_losses_of_pages(model: nn.Module, pages: Images) -> Tensor:
    """Every page is a mini-batch of its own, as that of a worker with one image."""
    losses = []
    for page in torch.arange(len(pages)).split(1):
        losses.append(_compute_loss_of_pages(model, pages.select(page)))
    return sum(losses) / len(losses)


def _compute_loss_of_pages(model: nn.Module, pages: Images) -> Tensor:
    return F.cross_entropy(model(pages.pixels), pages.labels.flatten())


@torch.no_grad()
def _measure_pages(model: nn.Module, pages: Images) -> float:
    """Accuracy of the digits, one page at a time, in %."""
    right = [model(page).argmax(1) == labels for page, labels in zip(pages.pixels.split(1), pages.labels, strict=True)]
    return 100 * float(torch.cat(right).float().mean())


def tell_correlated(seed: int, extent: Extent, folder: Path) -> Outcome:
    """A worker has one page, whose digits are alike, as the RoIs of an image are of few classes."""
    train, val = load_digits(extent)

    def print_steps(composition: str) -> list[Images]:
        """Four pages for each step."""
        options = {"epochs": extent.epochs, "seed": seed, "composition": composition}
        pages = [_print_pages(digits) for digits in Batches(train, _PAGE, **options)]
        steps = [pages[start : start + _PAGES] for start in range(0, len(pages) - _PAGES + 1, _PAGES)]
        return [_join(step) for step in steps]

    like, mixed = print_steps("one_class"), print_steps("mixed")
    tests = [_print_pages(digits) for digits in Batches(val, _PAGE, 1, seed, "one_class")]
    test = _join(tests)

    model = PageReader(seed).train()
    train_classifier(model, like, compute_loss=_add_losses_of_pages)
    data = [page for step in like[:4] for page in step.pixels.split(1)]
    diagnosis = bnext.diagnose(model, data, num_batches=len(data))
    before = _measure_pages(model.eval(), test)

    follow_remedy(diagnosis, model=model)
    again = bnext.diagnose(model.train(), data, num_batches=len(data))
    after = _measure_pages(model.eval(), test)

    more = {}
    others = PageReader(seed).train()
    train_classifier(others, mixed, compute_loss=_add_losses_of_pages)
    more["pages of all classes in training"] = _measure_pages(others.eval(), test)

    dealt = PageReader(seed, norm=bnext.BatchNorm2d).train()
    bnext.deal_statistics(dealt.classifier, num_groups=_PAGES)
    train_classifier(dealt, like, compute_loss=_compute_loss_of_pages)
    more["the same pages, dealt statistics"] = _measure_pages(dealt.eval(), test)
    return Outcome(before, after, None, diagnosis, again, more)


def _join(pages: list[Images]) -> Images:
    return Images(torch.cat([page.pixels for page in pages]), torch.cat([page.labels for page in pages]))


MINI_BATCH_STORIES = {
    "train_mode": Story("one picture at a time, in training mode", "BN008", ACCURACY, tell_train_mode),
    "single_element": Story("training by single pictures, down to one pixel", "BN010", ACCURACY, tell_single_element),
    "two_domains": Story(
        "a batch of each domain, one moving average", "BN023", f"{ACCURACY}, mean of domains", tell_two_domains
    ),
    "shared_head": Story(
        "a plain norm in a head that sees three scales", "BN001", f"{ACCURACY}, mean of scales", tell_shared_head
    ),
    "correlated": Story("mini-batches of one page, whose digits are alike", "BN003", ACCURACY, tell_correlated),
}

"""BN030: test images that reach the model otherwise than training images, or than its first statistics were taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.initial_state import drop_initial
from bnext.functional import Moments, merge_moments

__all__ = ["CHECK"]

_OTHER_SCALE = 3.0  # of standard deviations; sets of photographs differ by less than 2
_FAR = 0.5  # standard deviations of pixels, between means
_LEAST_Z = 5.0  # standard errors, from the differences between images
_LEAST_IMAGES = 8  # of each part, from which on such an error is known
_IMAGENET_RGB = (123.675, 116.28, 103.53)  # of 8-bit pixels
_CLOSE = 1.0  # to these
_OTHER_FEATURES = math.log(10)  # of variances, between what the first norm gets and its statistics


def _examine(facts: Facts) -> Iterator[Evidence]:
    yield from _compare_parts(facts)
    yield from _read_config(facts)
    yield from _compare_with_first_norm(facts)


# ---- training images against test images


def _compare_parts(facts: Facts) -> Iterator[Evidence]:
    train, test = facts.images.get("train"), facts.images.get("test")
    if train is None or test is None or train.mean.shape[1] != test.mean.shape[1]:
        return

    ratio = float((_find_std(test) / _find_std(train).clamp(min=1e-12)).log().mean().exp())
    pixels = f"Training images have channel means {_list(_find_mean(train))}, test images {_list(_find_mean(test))}"
    if not 1 / _OTHER_SCALE < ratio < _OTHER_SCALE:
        text = f"{pixels}; standard deviations differ by a factor of {ratio:.3g}. They are scaled differently."
        remedy = Remedy("Scale both alike: 0 to 255 or 0 to 1, and the same mean and standard deviation.")
        yield Evidence("error", (), text, remedy, {"ratio": ratio})
    elif _is_swapped(train, test):
        text = f"{pixels}: the channels come in the opposite order (RGB and BGR)."
        yield Evidence("error", (), text, _advise_order(facts), {"ratio": ratio})
    else:
        distance, z = _find_shift(train, test)
        if distance >= _FAR and z >= _LEAST_Z:
            text = f"{pixels}, which are {distance:.2g} standard deviations apart, {z:.0f} times the error of "
            text += f"{len(train.count)} and {len(test.count)} images. The first layers see other features at test."
            advice = "Normalize both alike; if they are images of another domain, re-estimate the statistics on these."
            yield Evidence("warning", (), text, Remedy(advice), {"distance": distance, "z": z})


def _find_mean(images: Moments) -> Tensor:
    return merge_moments(images).mean


def _find_std(images: Moments) -> Tensor:
    return merge_moments(images).var.sqrt()


def _list(values: Sequence[float] | Tensor) -> str:
    return "(" + ", ".join(f"{float(value):.4g}" for value in values) + ")"


def _find_shift(train: Moments, test: Moments) -> tuple[float, float]:
    """Largest distance of a channel's means in standard deviations of pixels, and in its standard error."""
    if min(len(train.count), len(test.count)) < _LEAST_IMAGES:
        return 0.0, 0.0
    difference = (train.mean.mean(0) - test.mean.mean(0)).abs()
    variances = [part.mean.var(0) / len(part.count) for part in (train, test)]
    error = sum(variances[1:], variances[0]).sqrt()
    z = float((difference / error.clamp(min=1e-12)).max())
    return float((difference / _find_std(train).clamp(min=1e-12)).max()), z


def _is_swapped(train: Moments, test: Moments) -> bool:
    """Whether test images fit the training's far better with the first and the last channel exchanged.

    The difference between the two says it, in which the brightness of an image is not.
    """
    if train.mean.shape[1] != 3 or min(len(train.count), len(test.count)) < _LEAST_IMAGES:
        return False
    contrasts = [part.mean[:, 0] - part.mean[:, 2] for part in (train, test)]
    means = [contrast.mean() for contrast in contrasts]
    error = math.sqrt(sum(float(contrast.var()) / len(contrast) for contrast in contrasts))

    apart, crossed = float((means[0] - means[1]).abs()), float((means[0] + means[1]).abs())
    return apart >= _LEAST_Z * max(error, 1e-12) and crossed <= apart / 4


def _advise_order(facts: Facts) -> Remedy:
    text = "Read both in the order of the training; OpenCV gives BGR, Pillow and torchvision give RGB."
    order = facts.get_config("INPUT.FORMAT")
    return Remedy(
        text if order is None else f"{text} INPUT.FORMAT is {order!r}; the training mapper must heed it, too."
    )


# ---- what a config says of pixels


def _read_config(facts: Facts) -> Iterator[Evidence]:
    means, stds = facts.get_config("MODEL.PIXEL_MEAN"), facts.get_config("MODEL.PIXEL_STD")
    order = facts.get_config("INPUT.FORMAT")
    if not _is_numbers(means) or not _is_numbers(stds):
        return
    mean, std = [float(value) for value in means], [float(value) for value in stds]  # type: ignore[attr-defined]

    expected = {"RGB": _IMAGENET_RGB, "BGR": _IMAGENET_RGB[::-1]}
    opposite = {"RGB": "BGR", "BGR": "RGB"}.get(str(order), "")
    if opposite and _is_close(mean, expected[opposite]):
        text = f"MODEL.PIXEL_MEAN {_list(mean)} is ImageNet's in the order {opposite}, but INPUT.FORMAT is {order!r}."
        keys: Mapping[str, object] = {"MODEL.PIXEL_MEAN": mean[::-1], "MODEL.PIXEL_STD": std[::-1]}
        advice = f"Write both in the order {order}; or set INPUT.FORMAT to {opposite!r}, if the weights are of that."
        yield Evidence("error", (), text, Remedy(advice, dict(keys)))

    if all(0 < value <= 1 for value in mean) or all(value < 0.9 for value in std):
        text = f"MODEL.PIXEL_MEAN {_list(mean)} and MODEL.PIXEL_STD {_list(std)} are of pixels from 0 to 1; images are "
        text += "read with values from 0 to 255."
        larger = [round(255 * value, 3) if value <= 1 else value for value in mean]
        keys = {"MODEL.PIXEL_MEAN": larger}
        keys |= {"MODEL.PIXEL_STD": [round(255 * value, 3) if value < 0.9 else value for value in std]}
        yield Evidence("error", (), text, Remedy("Write them for values from 0 to 255.", dict(keys)))


def _is_numbers(values: object) -> bool:
    if not isinstance(values, (list, tuple)) or not values:
        return False
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _is_close(values: Sequence[float], expected: Sequence[float]) -> bool:
    if len(values) != len(expected):
        return False
    return all(abs(value - other) <= _CLOSE for value, other in zip(values, expected, strict=True))


# ---- images against the first statistics


def _compare_with_first_norm(facts: Facts) -> Iterator[Evidence]:
    """The first norm's input against the statistics that it was trained with, frozen or not."""
    forward = next((one for one in facts.forwards if one.normalized_by == "population" and not one.is_noise), None)
    path = next(iter(forward.calls), None) if forward is not None else None
    norm = facts.find_norm(path) if path is not None else None
    if forward is None or norm is None or not facts.is_trained or len(norm.populations) != 1:
        return

    population, calls = norm.populations[0], forward.calls[norm.path]
    parts = [torch.cat(fields) for fields in zip(*(call.samples for call in calls), strict=True)]
    given = merge_moments(Moments(*parts))
    is_initial = not population.mean.count_nonzero() and bool((population.var == 1).all())
    if is_initial or given.var.shape != population.var.shape:
        return

    ways = [population.var, drop_initial(norm, population).var]  # of a training that has just begun
    log_ratios = [float(((given.var + norm.record.eps) / (var + norm.record.eps)).log().median()) for var in ways]
    log_ratio = min(log_ratios, key=abs)
    if not math.isfinite(log_ratio) or abs(log_ratio) < _OTHER_FEATURES:
        return
    ratio = math.exp(log_ratio)
    text = (
        f"The first norm gets features whose variance is {ratio:.3g} times that of its running statistics (median over "
        f"channels): pixels are {math.sqrt(ratio):.2g} times as large as when these were taken."
    )
    severity: Severity = "error"
    yield Evidence(severity, (norm.path,), text, _advise_scale(facts), {"ratio": ratio})


def _advise_scale(facts: Facts) -> Remedy:
    text = "Give the model pixels as its weights were trained with: their range, mean and standard deviation."
    if facts.origin.kind == "config":
        std = facts.get_config("MODEL.PIXEL_STD")
        text += f" MODEL.PIXEL_STD is {std}; it is 1 for weights that have the division in their first convolution."
    return Remedy(text)


CHECK = Check(
    code="BN030",
    name="preprocessing-differs",
    title="images do not reach the model as they did in training",
    explanation=(
        "Population statistics of the first layers are those of the pixels that the training saw. Another range (0 to "
        "1 instead of 0 to 255), the opposite order of channels, or another mean and standard deviation at test makes "
        "them wrong, and everything behind them. Test images of another domain look the same to this check: then the "
        "statistics can be adapted."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

"""Corruptions of a picture: one function, and the table of what each severity is.

The fifteen are those of COCO-C, the package `imagecorruptions`, for pictures of any size; its pixels are a test. The
parameters are those of ImageNet-C but for elastic_transform, which has no affine part here, and the streaks of motion
blur and snow, which ImageMagick draws there. They are defined here because that package, as it installs today, needs
opencv-python, which breaks opencv-python-headless, and draws from NumPy's global generator.

Source: Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*,
2019, arXiv 1903.12261. Michaelis et al., *Benchmarking Robustness in Object Detection*, 2019, arXiv 1907.07484.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bnext.data.corruptions import blur, digital, noise, weather
from bnext.data.corruptions.names import ENLARGE, check_corruption, find_smallest
from bnext.errors import DatasetError, Refusal

__all__ = ["corrupt"]

Definition = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]

# Name -> definition, and its strength at severity 1 to 5.
_TABLE: Mapping[str, tuple[Definition, Sequence[Any]]] = {
    "gaussian_noise": (noise.add_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (noise.add_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (noise.add_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (blur.blur_defocused, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (blur.blur_glass, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (blur.blur_moving, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (blur.blur_zooming, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        weather.add_snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (weather.add_frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (weather.add_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (digital.brighten, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (digital.lower_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (digital.stretch, (12.5, 16.25, 21.25, 25, 30)),
    "pixelate": (digital.pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (digital.compress_jpeg, (25, 18, 15, 10, 7)),
    "invert": (digital.invert, (0.8, 0.6, 0.4, 0.2, 0)),
    "low_contrast": (digital.lower_contrast_to_grey, (0.75, 0.5, 0.35, 0.25, 0.15)),
}

_NO_IMAGE = Refusal(
    DatasetError, "A picture that is corrupted", "be [H, W, 3] of 8 bits, RGB", "Read it as `read_image` does."
)
_TOO_SMALL = Refusal(DatasetError, "A picture", "have at least {smallest} pixels on each side for {name}", ENLARGE)


def corrupt(image: np.ndarray, name: str, severity: int, seed: int = 0, *, where: str = "") -> np.ndarray:
    """A picture, corrupted.

    Args:
        image: [H, W, 3] RGB of 8 bits; it is not changed.
        name: one of `bnext.data.corruptions.names.NAMES`.
        severity: 1 to 5.
        seed: 0 or more; the same one gives the same picture. No generator of the caller's is used.
        where: the file, for errors.

    Returns:
        [H, W, 3] RGB of 8 bits.

    Raises:
        ConfigError, LaunchError: see `check_corruption`.
        DatasetError: the picture is none, or too small.

    Example:
        >>> corrupt(np.full((1, 1, 3), 51, dtype=np.uint8), "invert", severity=5)
        array([[[204, 204, 204]]], dtype=uint8)
    """
    check_corruption(name, severity, where)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise _NO_IMAGE.of(f"{list(image.shape)} of {image.dtype}", where)
    smallest = find_smallest(name)
    if min(image.shape[:2]) < smallest:
        raise _TOO_SMALL.of(f"{image.shape[1]} x {image.shape[0]}", where, smallest=smallest, name=name)

    define, strengths = _TABLE[name]
    pixels = define(image / 255, strengths[severity - 1], np.random.default_rng(seed))
    return np.floor(255 * np.clip(pixels, 0, 1) + 1e-6).astype(np.uint8)  # cut off, not rounded, as ImageNet-C does

"""Blur: pixels mixed with those around them."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage, signal

__all__ = ["blur_defocused", "blur_glass", "blur_moving", "blur_zooming", "smooth", "streak", "zoom_in"]


def blur_defocused(pixels: np.ndarray, strength: tuple[int, float], random: np.random.Generator) -> np.ndarray:
    """A lens out of focus: the mean over a disk, whose edge is softened.

    Args:
        strength: radius of the disk in pixels; standard deviation of the Gaussian that softens it.
    """
    radius, softness = strength
    reach, taps = (8, 1) if radius <= 8 else (radius, 2)
    places = np.arange(-reach, reach + 1)
    disk = (places**2 + places[:, None] ** 2 <= radius**2).astype(float)
    disk /= disk.sum()

    bell = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * softness**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, bell / bell.sum(), axis, mode="mirror")

    framed = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return signal.oaconvolve(framed, disk[:, :, None], mode="valid", axes=(0, 1))  # a disk is symmetric


def blur_glass(pixels: np.ndarray, strength: tuple[float, int, int], random: np.random.Generator) -> np.ndarray:
    """Frosted glass: smoothed, pixels displaced one after the other, smoothed again.

    Args:
        strength: standard deviation of the smoothing in pixels; farthest displacement; times over the picture.

    Note:
        A pixel is overwritten by one nearby. ImageNet-C means to exchange the two, but its pixels are views of one
        array, so that the second half of its exchange copies a pixel onto itself; its published pictures are so.
    """
    sigma, reach, times = strength
    height, width = pixels.shape[:2]
    coarse = np.floor(255 * smooth(pixels, sigma)) / 255

    rows = np.arange(height - reach, reach, -1)[:, None]
    columns = np.arange(width - reach, reach, -1)
    shifts = random.integers(-reach, reach, size=(times, len(rows), len(columns), 2))  # to the right, and down
    places = np.broadcast_to(rows * width + columns, shifts.shape[:3])
    others = places + shifts[..., 1] * width + shifts[..., 0]

    origins = list(range(height * width))
    for place, other in zip(places.ravel().tolist(), others.ravel().tolist(), strict=True):
        origins[place] = origins[other]

    shuffled = coarse.reshape(-1, 3)[origins].reshape(pixels.shape)
    return smooth(shuffled, sigma)


def blur_moving(pixels: np.ndarray, strength: tuple[int, float], random: np.random.Generator) -> np.ndarray:
    """A camera in motion, at an angle of at most 45 degrees to the horizontal; see `streak`."""
    return streak(pixels, *strength, angle=random.uniform(-45, 45))


def blur_zooming(pixels: np.ndarray, strength: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """A camera that comes nearer: the mean of the picture and its enlargements.

    Args:
        strength: the enlargement that is not reached any more, and the step, from 1 on.
    """
    largest, step = strength
    factors = np.arange(1, largest, step)

    total = pixels.copy()
    for factor in factors:
        total += zoom_in(pixels, factor)
    return total / (len(factors) + 1)


def smooth(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Pixels under a Gaussian of a standard deviation in pixels, cut off at four of them."""
    return ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest", truncate=4)


def zoom_in(pixels: np.ndarray, factor: float, *, keep: bool = True) -> np.ndarray:
    """The middle of a picture [H, W, ...], enlarged.

    Args:
        factor: 1 or more.
        keep: whether what goes beyond H and W is cut off.
    """
    height, width = pixels.shape[:2]
    high, wide = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - high) // 2, (width - wide) // 2

    middle = pixels[top : top + high, left : left + wide]
    enlarged = ndimage.zoom(middle, (factor, factor, 1)[: pixels.ndim], order=1)
    return enlarged[:height, :width] if keep else enlarged


def streak(pixels: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Pixels drawn out in one direction.

    Args:
        pixels: [H, W, ...].
        radius: half the length of a streak, in pixels.
        sigma: standard deviation of the weights along it, which begin with their largest.
        angle: degrees.

    Note:
        A streak that leaves a small picture ends there, and the picture becomes darker.
    """
    height, width = pixels.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))

    total = np.zeros_like(pixels, dtype=float)
    for step, weight in zip(steps.tolist(), weights, strict=True):
        dy, dx = math.ceil(step * down - 0.5), math.ceil(step * right - 0.5)
        if abs(dy) >= height or abs(dx) >= width:
            break
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        total += weight * pixels[rows[:, None], columns]
    return total

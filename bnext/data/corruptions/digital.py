"""Digital changes: values, sizes and files, and a lens that bends."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
from PIL import Image
from scipy import ndimage

__all__ = ["brighten", "compress_jpeg", "invert", "lower_contrast", "lower_contrast_to_grey", "pixelate", "stretch"]


def brighten(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    """More of the value V of hue, saturation and value: the three colours are scaled together; black becomes grey."""
    value = pixels.max(axis=2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, pixels / np.where(value > 0, value, 1), 1) * brighter


def lower_contrast(pixels: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Contrast about the mean of each channel."""
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (pixels - mean)


def lower_contrast_to_grey(pixels: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Contrast about grey, the same for all pictures: mean and variance move."""
    return 0.5 + factor * (pixels - 0.5)


def invert(pixels: np.ndarray, threshold: float, random: np.random.Generator) -> np.ndarray:
    """Values from a threshold on become their negative: at 0 all of them, as in a film; else a solarized picture."""
    return np.where(pixels >= threshold, 1 - pixels, pixels)


def stretch(pixels: np.ndarray, alpha: float, random: np.random.Generator) -> np.ndarray:
    """Elastic: each pixel is taken from a place nearby, by a smooth random displacement.

    Args:
        alpha: factor of the displacement.
    """
    height, width = pixels.shape[:2]
    farthest, sigma = 0.005 * height, (0.01 * height, 0.01 * width)

    shifts = []
    for _ in range(2):
        noise = random.uniform(-farthest, farthest, size=(height, width))
        shifts.append(alpha * ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3))
    dx, dy = shifts

    places = (np.arange(height)[:, None] + dy, np.arange(width) + dx)
    move = partial(ndimage.map_coordinates, coordinates=places, order=1, mode="reflect")
    return np.stack([move(channel) for channel in pixels.transpose(2, 0, 1)], axis=2)


def pixelate(pixels: np.ndarray, factor: float, random: np.random.Generator) -> np.ndarray:
    """Made smaller, and each pixel shown as a square."""
    image = _to_image(pixels)
    small = image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST)) / 255


def compress_jpeg(pixels: np.ndarray, quality: int, random: np.random.Generator) -> np.ndarray:
    """Written as JPEG of a quality, and read."""
    file = io.BytesIO()
    _to_image(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.asarray(image) / 255


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(255 * pixels).astype(np.uint8))

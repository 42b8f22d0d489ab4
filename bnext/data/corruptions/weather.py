"""Weather: something before the lens."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from bnext.data.corruptions.blur import streak, zoom_in
from bnext.data.corruptions.names import find_frost

__all__ = ["add_fog", "add_frost", "add_snow", "draw_plasma"]

_GREY = np.array([0.299, 0.587, 0.114])


def add_snow(pixels: np.ndarray, strength: tuple[float, ...], random: np.random.Generator) -> np.ndarray:
    """Flakes that fall in streaks, in a whitened scene.

    Args:
        strength: mean and standard deviation of the flakes' noise, its enlargement, the value from which on it is a
            flake; radius and sigma of the streaks, see `streak`; share of the scene that is not whitened.
    """
    mean, scale, size, least, radius, sigma, kept = strength
    height, width = pixels.shape[:2]

    flakes = zoom_in(random.normal(mean, scale, size=(height, width)), size, keep=False)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = streak(flakes, int(radius), sigma, angle=random.uniform(-135, -45))
    layer = np.round(flakes * 255)[:height, :width, None] / 255

    white = np.maximum(pixels, (pixels @ _GREY)[:, :, None] * 1.5 + 0.5)
    return kept * pixels + (1 - kept) * white + layer + np.rot90(layer, k=2)


def add_frost(pixels: np.ndarray, strength: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Crystals of ice: a part of one of six photographs.

    Args:
        strength: weights of the picture and of the ice.
    """
    height, width = pixels.shape[:2]
    file = find_frost()[random.integers(6)]
    with Image.open(file) as photograph:
        ice = np.asarray(photograph.convert("RGB"))

    # Large enough for the picture, and a tenth more, so that there is a choice of parts.
    factor = 1.1 * max(1, height / ice.shape[0], width / ice.shape[1])
    size = [math.ceil(side * factor) for side in ice.shape[:2]]
    whole = torch.tensor(ice).permute(2, 0, 1)[None].float()
    large = functional.interpolate(whole, size=size, mode="bicubic", align_corners=False)[0]
    layer = large.round().clamp(0, 255).permute(1, 2, 0).double().numpy() / 255

    top, left = random.integers(0, size[0] - height), random.integers(0, size[1] - width)
    return strength[0] * pixels + strength[1] * layer[top : top + height, left : left + width]


def add_fog(pixels: np.ndarray, strength: tuple[float, float], random: np.random.Generator) -> np.ndarray:
    """Fog: a plasma fractal is added, and the sum scaled back to the picture's largest value.

    Args:
        strength: weight of the fog; the factor by which its structure loses height from one scale to the next.
    """
    weight, decay = strength
    height, width = pixels.shape[:2]
    plasma = draw_plasma(2 ** math.ceil(math.log2(max(height, width))), decay, random)

    largest = pixels.max()
    fogged = pixels + weight * plasma[:height, :width, None]
    return fogged * largest / (largest + weight)


def draw_plasma(side: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """A random landscape by the diamond-square algorithm, on a torus.

    Args:
        side: a power of 2.
        decay: see `add_fog`.

    Returns:
        [side, side], 0 to 1.
    """
    land = np.zeros((side, side))
    roughness, step = 100.0, side

    while step >= 2:
        half = step // 2
        corners = land[::step, ::step]
        right = np.roll(corners, -1, axis=1)
        below = np.roll(corners, -1, axis=0)
        centers = (corners + right + below + np.roll(right, -1, axis=0)) / 4
        centers += roughness * random.uniform(-roughness, roughness, corners.shape)
        land[half::step, half::step] = centers

        above = (centers + np.roll(centers, 1, axis=0) + corners + right) / 4
        land[::step, half::step] = above + roughness * random.uniform(-roughness, roughness, above.shape)
        beside = (centers + np.roll(centers, 1, axis=1) + corners + below) / 4
        land[half::step, ::step] = beside + roughness * random.uniform(-roughness, roughness, beside.shape)

        step, roughness = half, roughness / decay

    land -= land.min()
    return land / land.max()

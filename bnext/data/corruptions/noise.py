"""Noise: each element of a picture by itself.

All definitions of this room take pixels [H, W, 3] (RGB, 0 to 1), the strength of their row in the table, and a
generator; they give new pixels, which the caller clips.
"""

from __future__ import annotations

import numpy as np

__all__ = ["add_gaussian_noise", "add_impulse_noise", "add_shot_noise"]


def add_gaussian_noise(pixels: np.ndarray, scale: float, random: np.random.Generator) -> np.ndarray:
    """Noise of electronics in the dark: the same at all brightnesses."""
    return pixels + random.normal(scale=scale, size=pixels.shape)


def add_shot_noise(pixels: np.ndarray, photons: float, random: np.random.Generator) -> np.ndarray:
    """Noise of light that comes in photons, so many of them in a white pixel."""
    return random.poisson(pixels * photons) / photons


def add_impulse_noise(pixels: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    """Salt and pepper: elements that are full or empty, each half of the amount."""
    is_hit = random.random(pixels.shape) <= amount
    is_salt = random.random(pixels.shape) <= 0.5
    return np.where(is_hit, is_salt, pixels)

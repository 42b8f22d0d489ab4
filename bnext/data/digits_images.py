"""Draws the pictures of the digits set: real handwritten digits pasted onto crops of real photographs.

Knows no files and no annotation format; `bnext.data.digits` writes down what is drawn here.
Shape letters: N digits, S side of the picture in pixels, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from bnext.errors import DatasetError

__all__ = ["DigitsRecipe", "DrawnDigit", "Sources", "draw_picture", "load_sources"]

SPLITS = ("train", "val")
WHERE = "digits set"  # in the messages
LIMITS = {
    "seed": (0, 2**63 - 1),
    "num_train": (1, 10**6),
    "num_val": (1, 10**6),
    "image_side": (32, 4096),
    "max_objects": (1, 50),
    "image_style": (0, 1),
    "image_classes": (1, 10),
}
SMALLEST_DIGIT = 8  # pixels: the height of the scanned digits; below it they cannot be told apart
STROKE = 0.5  # ink from which a pixel belongs to the digit
SOFTNESS = 0.3  # span of ink over which the stroke's edge fades
BLOCKS = (2, 4)  # rows and columns that a photograph is cut into
VAL_BLOCKS = ((0, 1), (1, 3))
MARGIN = 2  # pixels between the boxes of two digits
PLACES_TRIED = 40  # per digit, before the picture is redrawn
DRAWS_TRIED = 500  # per picture, before the recipe is refused
DENSEST_HAZE = 0.9  # the most that a picture's own colour may cover of it


@dataclass(frozen=True)
class DigitsRecipe:
    """The arguments that a digits set follows from; equal recipes give equal bytes.

    Args:
        seed: any integer from 0.
        num_train: pictures in the training split, from 1.
        num_val: pictures in the validation split, from 1.
        image_side: side of the square pictures in pixels, 32 to 4096.
        max_objects: most digits per picture; their number is uniform in 1..max_objects.
        scale_range: smallest and largest height of a digit as a share of `image_side`, drawn log-uniformly.
        image_style: how much the pictures differ from one another in palette and contrast, 0 to 1. Each is seen
            through a haze of its own: a uniform share up to 0.9 * `image_style` of it is covered by a random colour.
            Digits, places and backgrounds are those of 0.
        image_classes: different digits in one picture at most, 1 to 10; each picture draws its own.

    Raises:
        DatasetError: an argument is outside its range.
    """

    seed: int = 0
    num_train: int = 1000
    num_val: int = 200
    image_side: int = 128
    max_objects: int = 4
    scale_range: tuple[float, float] = (0.09, 0.9)
    image_style: float = 0.0
    image_classes: int = 10

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                remedy = "Give a value in that range."
                raise DatasetError.of(name, f"be from {low} to {high}", got=value, where=WHERE, remedy=remedy)

        smallest, largest = self.scale_range
        if not 0 < smallest <= largest <= 0.95:
            raise DatasetError.of(
                "scale_range",
                "hold two shares of the image side, 0 < smallest <= largest <= 0.95",
                got=f"{smallest} {largest}",
                where=WHERE,
                remedy="The default is 0.09 0.9.",
            )

        if smallest * self.image_side < SMALLEST_DIGIT:
            raise DatasetError.of(
                "scale_range",
                f"keep every digit at {SMALLEST_DIGIT} pixels or more",
                got=f"{smallest} of {self.image_side} pixels",
                where=WHERE,
                remedy=f"Raise the smallest scale to {SMALLEST_DIGIT / self.image_side:.3g}, or the image side.",
            )

    def count(self, split: str) -> int:
        """Pictures of a split."""
        return self.num_train if split == "train" else self.num_val


@dataclass(frozen=True)
class Sources:
    """The material of one split: digits (N, 8, 8) with ink 0..1, labels (N,), pieces of photographs."""

    digits: np.ndarray
    labels: np.ndarray
    backgrounds: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class DrawnDigit:
    """One digit as drawn: its value 0..9 and the pixels where it can be seen, bool (S, S)."""

    label: int
    mask: np.ndarray


def load_sources(split: str) -> Sources:
    """The digits and backgrounds of "train" or "val"; the two splits share neither a digit nor a background pixel.

    Digits: a fixed permutation, four fifths for training, whatever the seed of the pictures.
    Photographs: cut into blocks, three quarters for training. The blocks for validation are spread so that both
    splits have sky, walls, leaves and petals: statistics of the one shall hold for the other.

    Raises:
        DatasetError: scikit-learn, which has both, is not installed.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise DatasetError.of(
            "scikit-learn",
            "be installed to make the digits set",
            got=str(error),
            where=WHERE,
            remedy="Run `pip install scikit-learn`.",
        ) from error

    bunch = load_digits()
    order = np.random.default_rng(1797).permutation(len(bunch.target))
    cut = len(order) * 4 // 5
    chosen = order[:cut] if split == "train" else order[cut:]

    blocks = []
    for photograph in load_sample_images().images:
        rows, columns = (length // count for length, count in zip(photograph.shape, BLOCKS, strict=False))
        for row, column in np.ndindex(*BLOCKS):
            if ((row, column) in VAL_BLOCKS) == (split == "val"):
                blocks.append(photograph[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns])

    return Sources(bunch.images[chosen] / 16.0, bunch.target[chosen], tuple(blocks))


def draw_picture(
    recipe: DigitsRecipe, sources: Sources, rng: np.random.Generator
) -> tuple[np.ndarray, list[DrawnDigit]]:
    """Draw one picture, uint8 (S, S, 3), and its digits; a picture whose digits find no place is redrawn.

    Raises:
        DatasetError: no picture with these scales and numbers could be drawn.
    """
    # Streams of their own: what else is drawn does not depend on them.
    style_rng, classes_rng = rng.spawn(2)
    sources = _choose_classes(sources, recipe.image_classes, classes_rng)
    number = int(rng.integers(1, recipe.max_objects + 1))

    for _ in range(DRAWS_TRIED):
        glyphs = _draw_glyphs(number, recipe, sources, rng)
        corners = _place([ink.shape for _, ink in glyphs], recipe.image_side, rng)
        if corners is None:
            continue

        picture = _draw_background(recipe.image_side, sources, rng)
        drawn = []
        for (label, ink), corner in zip(glyphs, corners, strict=True):
            drawn.append(DrawnDigit(label, _paint(picture, ink, corner, rng)))
        picture = _cover(picture, recipe.image_style, style_rng)
        return np.rint(picture).astype(np.uint8), drawn

    smallest, largest = recipe.scale_range
    raise DatasetError.of(
        "max_objects",
        "leave room for the digits",
        got=f"{recipe.max_objects}, of which {number} of scale {smallest} to {largest} found no place",
        where=WHERE,
        remedy="Use fewer objects or smaller scales.",
    )


def _choose_classes(sources: Sources, number: int, rng: np.random.Generator) -> Sources:
    """The sources with the digits of `number` random classes alone."""
    classes = np.unique(sources.labels)
    chosen = np.isin(sources.labels, rng.permutation(classes)[:number])
    return Sources(sources.digits[chosen], sources.labels[chosen], sources.backgrounds)


def _draw_glyphs(
    number: int, recipe: DigitsRecipe, sources: Sources, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """(label, ink float (H, W)) of every digit of one picture, the largest first."""
    smallest, largest = np.log(recipe.scale_range)
    heights = np.exp(rng.uniform(smallest, largest, number)) * recipe.image_side

    glyphs = []
    for height in sorted(heights, reverse=True):
        index = int(rng.integers(len(sources.labels)))
        ink = _render(sources.digits[index], max(SMALLEST_DIGIT, round(height)), recipe.image_side)
        glyphs.append((int(sources.labels[index]), ink))
    return glyphs


def _render(digit: np.ndarray, height: int, side: int) -> np.ndarray:
    """Enlarge a scanned digit so that its visible part is `height` pixels high: opacity 0..1 (H, W)."""
    scan = Image.fromarray(np.pad(digit, 1).astype(np.float32))
    zoom = 16  # the visible extent is found to a sixteenth of a scanned pixel
    visible = np.asarray(scan.resize((10 * zoom, 10 * zoom), Image.Resampling.BICUBIC)) >= STROKE
    left, top, right, bottom = (edge / zoom for edge in _extent(visible))

    width = min(max(2, round(height * (right - left) / (bottom - top))), side)
    ink = np.asarray(scan.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom)))
    return np.clip((ink - STROKE) / SOFTNESS + 0.5, 0.0, 1.0)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the true pixels; right and bottom exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(shapes: list[tuple[int, ...]], side: int, rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """Top left corners (row, column) of boxes that keep `MARGIN` apart; None when one finds no place."""
    corners: list[tuple[int, int]] = []
    for height, width in shapes:
        for _ in range(PLACES_TRIED):
            top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
            gaps = []
            for (y, x), (h, w) in zip(corners, shapes, strict=False):
                gaps.append(max(top - y - h, y - top - height, left - x - w, x - left - width))

            if all(gap >= MARGIN for gap in gaps):
                corners.append((top, left))
                break
        else:
            return None

    return corners


def _draw_background(side: int, sources: Sources, rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, resized to float (S, S, 3), at times mirrored, softened a little."""
    block = sources.backgrounds[int(rng.integers(len(sources.backgrounds)))]
    rows, columns = block.shape[:2]
    widest = min(rows, columns)
    crop = round(float(np.exp(rng.uniform(np.log(widest / 3), np.log(widest)))))
    top, left = int(rng.integers(rows - crop + 1)), int(rng.integers(columns - crop + 1))

    square = Image.fromarray(block[top : top + crop, left : left + crop])
    picture = np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]

    mean = picture.mean((0, 1))
    return mean + (picture - mean) * rng.uniform(0.5, 0.9)


def _paint(picture: np.ndarray, ink: np.ndarray, corner: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Blend a digit into `picture` (in place), bright on dark or dark on bright; the pixels where it shows."""
    rows, columns = (slice(start, start + length) for start, length in zip(corner, ink.shape, strict=True))
    local = picture[rows, columns]

    lightness = rng.uniform(200, 255) if local.mean() < 128 else rng.uniform(0, 55)
    colour = np.clip(lightness + rng.normal(0, 20, 3), 0, 255)
    picture[rows, columns] = local + ink[..., None] * (colour - local)

    mask = np.zeros(picture.shape[:2], dtype=bool)
    mask[rows, columns] = ink >= 0.5
    return mask


def _cover(picture: np.ndarray, style: float, rng: np.random.Generator) -> np.ndarray:
    """Haze of a random density and colour over the picture: less contrast, another palette.

    y = (1 - a) x + a colour,  a uniform in 0..DENSEST_HAZE * style
    """
    density, colour = style * rng.uniform(0, DENSEST_HAZE), rng.uniform(0, 255, 3)
    return picture + density * (colour - picture)

"""One style for all pictures: colours that colour-blind people tell apart, sizes in pixels, and files that are whole.

No global state of matplotlib is read or changed: pyplot, which may want a display, is not used. It is imported with
the first picture, as most runs draw none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from bnext.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "DPI", "GREY", "INK", "PLAIN", "is_dark", "make_figure", "save_figure", "style_axes", "to_points"]

# Okabe and Ito, *Color Universal Design*, 2008.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "sky": "#56B4E9",
    "vermillion": "#D55E00",
    "black": "#000000",
}
PLAIN = tuple(COLORS.values())  # of bars and curves, in this order
INK, GREY = "#1a1a1a", "#666666"  # of words
DPI = 100  # pixels of an inch of matplotlib's; the size of a picture is what it has when it is shown pixel by pixel


def make_figure(width: float, height: float, *, by_hand: bool = False) -> Figure:
    """An empty figure on white, which can be read on a dark page, too.

    Args:
        width, height: pixels.
        by_hand: whether all axes are placed by the caller; else matplotlib keeps them apart.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    if not by_hand:
        figure.set_layout_engine("constrained")
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, whole or not at all; folders are made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]  # all of it is opaque
    replace_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG", optimize=True))
    return path


def to_points(pixels: float) -> float:
    """The size of a font or line in matplotlib's points."""
    return pixels * 72 / DPI


def style_axes(axes: Any, *, pixels: float = 14) -> None:
    """Axes of bars or curves: no frame, words of a size."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=to_points(pixels), colors=INK)
    for words in (axes.xaxis.label, axes.yaxis.label):
        words.set_fontsize(to_points(pixels))
    axes.title.set_fontsize(to_points(pixels + 1))


def is_dark(color: str) -> bool:
    """Whether words on a colour are to be white.

    Example:
        >>> is_dark(COLORS["blue"]), is_dark(COLORS["orange"])
        (True, False)
    """
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128

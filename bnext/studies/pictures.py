"""Detections of several models on the same images, side by side in one PNG, each box drawn as what it is.

A picture has sections, such as one for each domain: in a section the same models are drawn on images of one set.

What a box is comes from `bnext.evaluation.matching`; bars of the same models are in `bnext.studies.bars`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform

from bnext.data.read_image import read_picture
from bnext.data.records import Record
from bnext.evaluation.detections import Detected, Examined
from bnext.evaluation.matching import OUTCOMES, Matches
from bnext.figures import COLORS, GREY, INK, is_dark, make_figure, save_figure, to_points
from bnext.text import flatten_text

__all__ = ["Layout", "Section", "draw_detections", "draw_sections"]

# What a box is -> its colour, and its line in widths of it (on, off, ...); (): solid.
_STYLES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "right": (COLORS["green"], ()),
    "wrong_class": (COLORS["orange"], (5, 2)),
    "duplicate": (COLORS["sky"], (5, 1.5, 1, 1.5)),
    "badly_placed": (COLORS["pink"], (2.5, 1.5)),
    "background": (COLORS["vermillion"], (1, 1)),
    "missed": (COLORS["black"], (3, 3)),
    "ignored": (GREY, ()),
    "detected": (COLORS["blue"], ()),
}
_WORDS = {**OUTCOMES, "ignored": "in a crowd, not counted", "detected": "detected (no annotations to judge by)"}

_TEXT, _TITLE = 14, 17  # pixels
_LINE, _FOOT_LINE = 19, 23  # pixels from one line of words to the next
_GAP, _BLOCK_GAP, _MARGIN = 8, 26, 14
_BOX = 2.5  # pixels of a box's line
_HALO = 1.0  # pixels of white at each side of it
_MOST_LABELS = 40  # in a cell


@dataclass(frozen=True)
class Layout:
    """Sizes of the pictures, in pixels.

    Args:
        cell: width of an image; None: as the images need it.
        page: width that several images beside each other may take.
        crop: whether the part of an image is enlarged that holds all boxes.
    """

    cell: int | None = None
    page: int = 1000
    crop: bool = False


@dataclass(frozen=True)
class _Cell:
    """An image, or a part of it, and where its pixels are drawn."""

    pixels: np.ndarray
    corner: tuple[float, float]  # x, y of the part in the image
    scale: float  # pixels of the picture for one of the image

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels of the picture."""
        height, width = self.pixels.shape[:2]
        return width * self.scale, height * self.scale

    def place(self, box: np.ndarray) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a box in the picture's pixels, from the cell's corner."""
        x, y, width, height = (float(number) for number in box)
        left, top = (x - self.corner[0]) * self.scale, (y - self.corner[1]) * self.scale
        return left, top, left + width * self.scale, top + height * self.scale


@dataclass(frozen=True)
class _Line:
    """A line of words above a column."""

    words: str
    is_title: bool = False


@dataclass(frozen=True)
class _Box:
    outcome: str
    corners: tuple[float, float, float, float]
    label: str


@dataclass(frozen=True)
class Section:
    """Images that stand together.

    Args:
        columns: models, of one set; all have examined the images.
        records: of the images.
        title: above all of them, such as their domain; "": none.
    """

    columns: Sequence[Examined]
    records: Sequence[Record]
    title: str = ""


def draw_detections(
    columns: Sequence[Examined],
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    note: str = "",
    layout: Layout | None = None,
) -> Path:
    """Draw what models detect in images: a column for each model, a row for each image.

    Args:
        columns: of one set; all have examined the images.
        records: of the images.
        path: of the PNG; written whole.
        note: of the last line, such as the set and the thresholds.
        layout: sizes; small images stand beside each other as far as the page is wide.

    Raises:
        DatasetError: an image cannot be read.
    """
    return draw_sections([Section(columns, records)], path, note=note, layout=layout)


def draw_sections(
    sections: Sequence[Section], path: str | os.PathLike[str], *, note: str = "", layout: Layout | None = None
) -> Path:
    """Draw one section below the other, with one legend; see `draw_detections`."""
    parts = [_Part(section, layout or Layout()) for section in sections]
    page = max(480.0, *(part.page for part in parts))
    columns = [column for section in sections for column in section.columns]
    legend, notes = _arrange_legend(columns, page - 2 * _MARGIN), _wrap(note, page - 2 * _MARGIN)
    foot = (len(legend) + len(notes)) * _FOOT_LINE

    canvas = _Canvas(page, sum(part.height for part in parts) + foot + _MARGIN / 2)
    top = 0.0
    for part in parts:
        part.draw(canvas, top)
        top += part.height

    _draw_foot(canvas, legend, notes, top)
    return save_figure(canvas.figure, path)


class _Part:
    """A section with its sizes: banner, headers of the columns, rows of images."""

    def __init__(self, section: Section, layout: Layout) -> None:
        self.section = section
        columns, records = section.columns, section.records
        self.cells = [_make_cell(record, columns, layout) for record in records]
        self.width = max(cell.size[0] for cell in self.cells)

        block = len(columns) * self.width + (len(columns) - 1) * _GAP  # an image in all columns
        num_blocks = max(1, min(len(records), int((layout.page + _BLOCK_GAP) // (block + _BLOCK_GAP))))
        self.lefts = [_MARGIN + number * (block + _BLOCK_GAP) for number in range(num_blocks)]
        self.page = 2 * _MARGIN + num_blocks * (block + _BLOCK_GAP) - _BLOCK_GAP

        self.banner, self.headers = self._arrange_words()
        self.head = max(map(len, self.headers), default=0) * _LINE + 12
        self.banner_height = len(self.banner) * _LINE + (_GAP if self.banner and self.headers else 0)
        self.rows = [
            range(start, min(start + num_blocks, len(records))) for start in range(0, len(records), num_blocks)
        ]
        self.heights = [max(self.cells[index].size[1] for index in row) + 2 * _LINE + 8 for row in self.rows]
        self.height = _MARGIN + self.banner_height + self.head + sum(self.heights)

    def _arrange_words(self) -> tuple[list[_Line], list[list[_Line]]]:
        """Lines above the whole section, and those above each column."""
        section, number, page = self.section, len(self.section.records), max(480.0, self.page) - 2 * _MARGIN
        if section.title and len(section.columns) == 1:
            return _arrange_header(replace(section.columns[0], title=section.title), number, page), []

        title = _shorten(flatten_text(section.title), page, _TITLE, "bold")
        headers = [_arrange_header(column, number, self.width) for column in section.columns]
        return [_Line(title, is_title=True)] if title else [], headers

    def draw(self, canvas: _Canvas, top: float) -> None:
        top += _MARGIN
        _write_header(canvas, self.banner, _MARGIN, top)
        top += self.banner_height
        for left in self.lefts:
            for index, words in enumerate(self.headers):
                _write_header(canvas, words, left + index * (self.width + _GAP), top)

        top += self.head
        columns, records = self.section.columns, self.section.records
        for row, height in zip(self.rows, self.heights, strict=True):
            for left, index in zip(self.lefts, row, strict=False):
                _draw_row(canvas, columns, records[index], self.cells[index], (left, top, self.width))
            top += height


class _Canvas:
    """A figure that is drawn on in pixels, from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.height = math.ceil(height)
        self.figure: Figure = make_figure(math.ceil(width), self.height, by_hand=True)

    def write(self, words: str, x: float, y: float, *, color: str = INK, size: float = _TEXT, **options: Any) -> None:
        """Words whose middle has the height y."""
        self.figure.text(
            x,
            self.height - y,
            words,
            transform=IdentityTransform(),
            va="center_baseline",
            color=color,
            fontsize=to_points(size),
            parse_math=False,
            **options,
        )

    def add(self, artist: Any) -> None:
        artist.set_transform(IdentityTransform())
        self.figure.add_artist(artist)

    def outline(self, corners: tuple[float, float, float, float], outcome: str) -> None:
        """A box with a white halo, which shows on every image."""
        color, dashes = _STYLES[outcome]
        left, top, right, bottom = corners
        place, size = (left, self.height - bottom), (right - left, bottom - top)

        for width, shade, style in ((_BOX + 2 * _HALO, "white", "-"), (_BOX, color, (0, dashes) if dashes else "-")):
            line: dict[str, Any] = {"linewidth": to_points(width), "linestyle": style, "edgecolor": shade}
            self.add(Rectangle(place, *size, fill=False, capstyle="butt", joinstyle="miter", **line))

    def fill(self, left: float, top: float, width: float, height: float, color: str) -> None:
        self.add(Rectangle((left, self.height - top - height), width, height, facecolor=color, edgecolor="none"))

    def show(self, pixels: np.ndarray, left: float, top: float, width: float, height: float) -> None:
        axes = self.figure.add_axes(
            (
                left / self.figure.bbox.width,
                1 - (top + height) / self.height,
                width / self.figure.bbox.width,
                height / self.height,
            ),
            zorder=-1,
        )
        axes.imshow(pixels, aspect="auto", interpolation="lanczos" if pixels.shape[1] > width else "bicubic")
        axes.set_axis_off()


def _measure(words: str, size: float = _TEXT, weight: str = "normal") -> float:
    """Width in pixels."""
    font = FontProperties(size=to_points(size), weight=weight)
    return float(_find_ruler().get_text_width_height_descent(words, font, False)[0])


@functools.cache
def _find_ruler() -> Any:
    return FigureCanvasAgg(make_figure(10, 10, by_hand=True)).get_renderer()


def _wrap(words: str, width: float, size: float = _TEXT, weight: str = "normal") -> list[str]:
    """Lines that are no wider, as far as single words allow."""
    lines: list[str] = []
    for word in words.split():
        if lines and _measure(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shorten(words: str, width: float, size: float = _TEXT, weight: str = "normal") -> str:
    """The words, or their beginning, no wider than a width."""
    if _measure(words, size, weight) <= width:
        return words
    while words and _measure(f"{words}...", size, weight) > width:
        words = words[:-1]
    return f"{words}..."


def _make_cell(record: Record, columns: Sequence[Examined], layout: Layout) -> _Cell:
    """The image, or its part with all boxes, and its scale."""
    pixels = read_picture(record, "RGB")
    x, y = 0, 0

    if layout.crop:
        number = record["image_id"]
        boxes = [column.detected[number].boxes for column in columns]
        boxes += [column.objects[number].boxes for column in columns if number in column.objects]
        x, y, right, bottom = _find_part(np.concatenate(boxes), pixels.shape)
        pixels = pixels[y:bottom, x:right]

    height, width = pixels.shape[:2]
    widest = {1: 640, 2: 480, 3: 360}.get(len(columns), 300)
    cell = layout.cell or min(widest, max(256, width))
    return _Cell(pixels, (x, y), min(cell / width, 1.25 * cell / height))


def _find_part(boxes: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part that holds all boxes, with some of the image around it."""
    height, width = shape[:2]
    if not len(boxes):
        return 0, 0, width, height

    left, top = boxes[:, 0].min(), boxes[:, 1].min()
    right, bottom = (boxes[:, 0] + boxes[:, 2]).max(), (boxes[:, 1] + boxes[:, 3]).max()
    side = 1.2 * max(right - left, bottom - top, 32)
    span = (min(side, width), min(side, height))

    starts = []
    for middle, length, whole in zip(((left + right) / 2, (top + bottom) / 2), span, (width, height), strict=True):
        starts.append(int(np.clip(middle - length / 2, 0, whole - length)))
    return starts[0], starts[1], math.ceil(starts[0] + span[0]), math.ceil(starts[1] + span[1])


def _arrange_header(column: Examined, num_images: int, width: float) -> list[_Line]:
    """Title, AP if it is known, and how many objects are found, in lines."""
    title = _wrap(flatten_text(column.title), width, _TITLE, "bold")
    header = [_Line(_shorten(line, width, _TITLE, "bold"), is_title=True) for line in title]
    counts = column.count()
    if not column.matches:
        return header

    ap = column.metrics.get("bbox/AP")
    num_objects, number = counts["right"] + counts["missed"], len(column.matches)
    where = f"in {number} images" if number > num_images else "in these images"
    words = f"{counts['right']} of {num_objects} objects found, {_count_false(counts)} false boxes {where}"
    lines = _wrap(words if ap is None else f"COCO AP {ap:.1f}: {words}", width)
    return header + [_Line(line) for line in lines]


def _count_false(counts: Mapping[str, int]) -> int:
    return sum(counts[outcome] for outcome in OUTCOMES if outcome not in ("right", "missed"))


def _write_header(canvas: _Canvas, lines: Sequence[_Line], left: float, top: float) -> None:
    for number, line in enumerate(lines):
        middle = top + (number + 0.5) * _LINE
        if line.is_title:
            canvas.write(line.words, left, middle, size=_TITLE, weight="bold")
        else:
            canvas.write(line.words, left, middle + 4)


def _draw_row(
    canvas: _Canvas, columns: Sequence[Examined], record: Record, cell: _Cell, place: tuple[float, float, float]
) -> None:
    """An image in all columns, under its name."""
    left, top, width = place
    number = record["image_id"]
    name = flatten_text(str(record["file_name"]).rpartition("/")[2])
    canvas.write(_shorten(name, width), left, top + _LINE / 2, color=GREY)

    for index, column in enumerate(columns):
        x, y = left + index * (width + _GAP), top + _LINE
        x += (width - cell.size[0]) / 2
        canvas.show(cell.pixels, x, y, *cell.size)

        matches = column.matches.get(number)
        boxes = _list_boxes(column, number, cell, matches)
        for box in boxes:
            shifted = (box.corners[0] + x, box.corners[1] + y, box.corners[2] + x, box.corners[3] + y)
            canvas.outline(shifted, box.outcome)
        _write_labels(canvas, boxes, (x, y), cell.size)

        words = f"{len(column.detected[number].boxes)} detected"
        if matches is not None:
            found, missed = matches.outcomes.count("right"), int(matches.missed.sum())
            false = sum(outcome not in ("right", "ignored") for outcome in matches.outcomes)
            words = f"{found} of {found + missed} found" + (f", {false} false" if false else "")
        canvas.write(_shorten(words, width), x, y + cell.size[1] + _LINE / 2 + 2)


def _list_boxes(column: Examined, number: Any, cell: _Cell, matches: Matches | None) -> list[_Box]:
    """The boxes of an image, those that are missed first, and the best at last, on top of the others."""
    detected: Detected = column.detected[number]
    objects = column.objects.get(number)

    boxes = []
    if matches is not None and objects is not None:
        for index in np.flatnonzero(matches.missed):
            label = _name(column, objects.classes[index])
            boxes.append(_Box("missed", _inside(cell, objects.boxes[index]), label))

    for index in np.argsort(detected.scores, kind="stable"):
        outcome = matches.outcomes[index] if matches is not None else "detected"
        label = _name(column, detected.classes[index])
        if outcome == "wrong_class" and matches is not None and objects is not None:
            truth = objects.classes[matches.objects[index]]
            label = f"{_name(column, detected.classes[index], 12)}\u2260{_name(column, truth, 12)}"
        boxes.append(_Box(outcome, _inside(cell, detected.boxes[index]), f"{label} {_show(detected.scores[index])}"))
    return boxes


def _inside(cell: _Cell, box: np.ndarray) -> tuple[float, float, float, float]:
    """The corners of a box, kept within the cell so that its line is seen."""
    left, top, right, bottom = cell.place(box)
    width, height = cell.size
    edge = _BOX / 2 + _HALO
    return (
        min(max(left, edge), width - edge),
        min(max(top, edge), height - edge),
        max(min(right, width - edge), edge),
        max(min(bottom, height - edge), edge),
    )


def _name(column: Examined, label: int, most: int = 18) -> str:
    name = flatten_text(column.names[label]) if label < len(column.names) else f"class {label}"
    return name if len(name) <= most else f"{name[: most - 2]}.."


def _show(score: float) -> str:
    """Two digits.

    Example:
        >>> _show(0.927), _show(0.999)
        ('.93', '1.0')
    """
    return "1.0" if score >= 0.995 else f"{score:.2f}"[1:]


def _write_labels(
    canvas: _Canvas, boxes: Sequence[_Box], corner: tuple[float, float], size: tuple[float, float]
) -> None:
    """A label at each box, where it hides no other label if there is such a place."""
    placed: list[tuple[float, float, float, float]] = []
    height = _TEXT + 3

    for box in boxes[::-1][:_MOST_LABELS]:
        words = _shorten(box.label, size[0] - 6)
        width = _measure(words) + 6
        place = _find_place(box.corners, (width, height), size, placed, [other.corners for other in boxes])
        placed.append((*place, place[0] + width, place[1] + height))

        color = _STYLES[box.outcome][0]
        left, top = corner[0] + place[0], corner[1] + place[1]
        canvas.fill(left - 1, top - 1, width + 2, height + 2, "white")
        canvas.fill(left, top, width, height, color)
        canvas.write(words, left + 3, top + height / 2, color="white" if is_dark(color) else "black")


def _find_place(
    box: tuple[float, float, float, float],
    size: tuple[float, float],
    cell: tuple[float, float],
    placed: Sequence[tuple[float, float, float, float]],
    boxes: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """The place where a label hides least of other labels, and then of boxes: above its box if it can be."""
    left, top, right, bottom = box
    width, height = size
    candidates = [
        (left, top - height),
        (right - width, top - height),
        (left, bottom),
        (right - width, bottom),
        (right, top),
        (left - width, top),
        (right, bottom - height),
        (left - width, bottom - height),
        (left, top),
        (right - width, bottom - height),
        (left, top - 2 * height),
        (left, bottom + height),
    ]

    best, least = (0.0, 0.0), math.inf
    for rank, (x, y) in enumerate(candidates):
        x, y = min(max(x, 1), cell[0] - width - 1), min(max(y, 1), cell[1] - height - 1)
        area = (x, y, x + width, y + height)
        hidden = sum(_overlap(area, other) for other in placed)
        covered = sum(_overlap(area, other) for other in boxes)
        is_apart = rank >= len(candidates) - 2
        cost = 100 * hidden + 0.2 * covered + 0.05 * rank * width + 0.4 * is_apart * width * height
        if cost < least:
            best, least = (x, y), cost
    return best


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _arrange_legend(columns: Sequence[Examined], width: float) -> list[list[tuple[str, float]]]:
    """Lines of kinds of boxes, each with where it begins."""
    outcomes = list(OUTCOMES)
    if not any(column.matches for column in columns):
        outcomes = ["detected"]
    elif any("ignored" in each.outcomes for column in columns for each in column.matches.values()):
        outcomes.append("ignored")

    lines: list[list[tuple[str, float]]] = [[]]
    place = 0.0
    for outcome in outcomes:
        needed = 42 + _measure(_WORDS[outcome]) + 16
        if lines[-1] and place + needed > width:
            lines.append([])
            place = 0.0
        lines[-1].append((outcome, place))
        place += needed
    return lines


def _draw_foot(
    canvas: _Canvas, legend: Sequence[Sequence[tuple[str, float]]], notes: Sequence[str], top: float
) -> None:
    """The legend, a stretch of line for each kind of box, and the notes."""
    middle = top + _FOOT_LINE / 2
    for entries in legend:
        for outcome, place in entries:
            color, dashes = _STYLES[outcome]
            ends, height = [_MARGIN + place, _MARGIN + place + 36], canvas.height - middle
            line: dict[str, Any] = {"linewidth": to_points(1.4 * _BOX), "linestyle": (0, dashes) if dashes else "-"}
            canvas.add(Line2D(ends, [height, height], color=color, dash_capstyle="butt", **line))
            canvas.write(_WORDS[outcome], _MARGIN + place + 42, middle)
        middle += _FOOT_LINE

    for words in notes:
        canvas.write(words, _MARGIN, middle, color=GREY)
        middle += _FOOT_LINE

"""Checks of a data set's pictures: that they are there, whole, and of the sizes that their records give.

Whether they are there is asked of a listing of their folders; what they are, of the headers of up to MOST_HEADERS of
them, evenly spread. The guarded reader (`read_image`) names whatever is wrong with the others when it comes to them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bnext.data.check_objects import Fault, Notice, Task
from bnext.data.corruptions.names import ENLARGE, find_smallest
from bnext.data.read_image import read_header, read_image, show_path
from bnext.errors import list_few
from bnext.progress import track

__all__ = ["Pictures", "check_files", "check_sizes", "read_side"]

MOST_HEADERS = 5000
MOST_PIXELS = 10**6  # in a row or column
MOST_READ = 100  # of the pictures that only reading tells more of


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data set.

    Args:
        root: their folder; "": the file names say it.
        file_names: below it.
        sizes: [P, 2], width and height as the records give them; NaN: they do not.
    """

    root: str
    file_names: Sequence[str]
    sizes: np.ndarray


def read_side(value: float) -> float:
    """A width or height as a float, also a whole number beyond their range."""
    try:
        return float(value)
    except OverflowError:
        return np.inf


def check_sizes(pictures: Pictures, task: Task) -> Iterator[Fault | Notice]:
    """Faults of the sizes and names in the records."""
    given = ~np.isnan(pictures.sizes)
    is_odd = given & ~(
        (pictures.sizes >= 1) & (pictures.sizes < MOST_PIXELS) & (pictures.sizes == np.floor(pictures.sizes))
    )
    odd = np.flatnonzero(is_odd.any(axis=1)).tolist()
    if odd:
        first = pictures.sizes[odd[0]]
        names = _name(pictures, odd)
        yield Fault(
            "The width and height of images",
            "be whole numbers of 1 or more",
            f"{first[0]:g} x {first[1]:g} in {len(odd)} of {len(pictures.file_names)}: {names}",
            remedy="Write the size of the picture there.",
        )

    if task.max_side is not None:
        short, long = pictures.sizes.min(axis=1), pictures.sizes.max(axis=1)
        thin = np.flatnonzero(short * task.max_side / long < 0.5).tolist()
        if thin:
            names = _name(pictures, thin)
            width, height = pictures.sizes[thin[0]]
            yield Fault(
                "The images",
                f"be a pixel wide and high after resizing to a longest side of {task.max_side}",
                f"{width:g} x {height:g} in {len(thin)} of {len(pictures.file_names)}: {names}",
                remedy="Cut or pad these pictures, or remove them from the set.",
            )

    smallest = find_smallest(task.corruption)
    is_small = ~is_odd & (pictures.sizes < smallest)
    small = np.flatnonzero(is_small.any(axis=1)).tolist()
    if small:
        width, height = pictures.sizes[small[0]]
        yield Fault(
            "The images",
            f"have at least {smallest} pixels on each side for {task.corruption}",
            f"{width:g} x {height:g} in {len(small)} of {len(pictures.file_names)}: {_name(pictures, small)}",
            remedy=ENLARGE,
        )

    counts = Counter(pictures.file_names) if len(set(pictures.file_names)) < len(pictures.file_names) else Counter()
    repeated = {show_path(name): count for name, count in counts.items() if count > 1}
    if repeated:
        follows = (
            "each is trained on with the objects of one record only, and all others as background"
            if task.is_training
            else "what is detected of the objects of another record counts as false"
        )
        words = f"are of a picture that an earlier record has, too: {list_few(repeated)}; {follows}"
        yield Notice(sum(repeated.values()) - len(repeated), len(pictures.file_names), "records", words)


def check_files(pictures: Pictures, task: Task) -> Iterator[Fault | Notice]:
    """Faults of the files.

    Raises:
        DatasetError: see `read_header` and `read_image`.
    """
    missing = _list_missing(pictures.root, pictures.file_names)
    if missing:
        got = f"{len(missing)} of {len(pictures.file_names)} missing: {list_few(missing)}"
        remedy = "Write / in place of \\ in the file names." if any("\\" in name for name in missing) else ""
        yield Fault("The image files", "exist", got, where=pictures.root, remedy=remedy)

    number = len(pictures.file_names)
    chosen = np.unique(np.linspace(0, number - 1, min(number, MOST_HEADERS)).astype(int))
    seen: set[str] = set()
    num_read = 0
    other: list[int] = []
    turned: list[int] = []

    for index in track(chosen.tolist(), "reading headers", unit="picture"):
        path = os.path.join(pictures.root, pictures.file_names[index])
        if path in seen or "://" in path:
            continue
        seen.add(path)

        header = read_header(path)
        if header.is_suspect and num_read < MOST_READ:
            num_read += 1
            read_image(path, task.image_format)

        size = pictures.sizes[index]
        if not _fits(size, header.shown):
            header = read_header(path, thorough=True)
        if not _fits(size, header.shown):
            (turned if _fits(size, header.stored) else other).append(index)
        if len(other) == MOST_READ:
            break

    if other:
        yield _name_other_sizes(pictures, other, len(seen))
    if turned:
        names = _name(pictures, turned)
        words = (
            f"are to be shown turned by their EXIF data, but have the size as stored in their records: {names}; they "
            "are read as stored, as their boxes were drawn, and detectron2's own reader would refuse them"
        )
        yield Notice(len(turned), len(seen), "pictures", words)


def _name(pictures: Pictures, indices: Sequence[int]) -> str:
    return list_few([show_path(pictures.file_names[index]) for index in indices])


def _fits(said: np.ndarray, size: tuple[int, int]) -> bool:
    return bool((np.isnan(said) | (said == size)).all())


def _name_other_sizes(pictures: Pictures, other: Sequence[int], number: int) -> Fault:
    paths = [os.path.join(pictures.root, pictures.file_names[index]) for index in other]
    shown = [read_header(path, thorough=True).shown for path in paths]
    are_swapped = all(_fits(pictures.sizes[index], size[::-1]) for index, size in zip(other, shown, strict=True))

    words = "with width and height exchanged" if are_swapped else "of another size"
    remedy = "Exchange the two in the records." if are_swapped else "Restore the pictures that were annotated."
    said = " x ".join(f"{side:g}" for side in pictures.sizes[other[0]])
    name, (width, height) = _name(pictures, other[:1]), shown[0]
    return Fault(
        "The pictures",
        "have the width and height of their records",
        f"{len(other)} of {number} {words}: {_name(pictures, other)}",
        where=f"{name} is {width} x {height}, its record says {said}",
        remedy=f"{remedy} Where the records are wrong, see that boxes were drawn on the pictures as they are.",
    )


def _list_missing(root: str, file_names: Sequence[str]) -> list[str]:
    """Compare with one listing per folder: quicker than asking for each of a hundred thousand files."""
    listed: dict[str, set[str]] = {}
    missing = []

    for file_name in file_names:
        folder, base = os.path.split(os.path.join(root, file_name))
        if "://" in folder:
            continue
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except (OSError, ValueError):
                listed[folder] = set()
        if base not in listed[folder]:
            missing.append(show_path(file_name) or "''")
    return missing

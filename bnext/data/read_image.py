"""Pictures: one reader for training, evaluation, validation loss, re-estimation and comparison.

    path, format, size that the record says  --read_image-->  [H, W, C], or a DatasetError that names file and remedy
    record, format  --read_picture-->  the same, with the corruption of the record's data set

What Detectron2's reader does silently is decided here. Values that do not fit into 8 bits are refused, not clipped to
white. A picture whose EXIF data ask for a rotation is turned as Detectron2 turns it, unless its record gives the size
as it is stored: then its boxes were drawn on the stored picture, too, and so it is read. What is no regular file (a
folder, a pipe) is named before anybody waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from bnext.errors import BNextError, DatasetError
from bnext.seeding import Purpose, derive_seed

__all__ = ["Header", "read_header", "read_image", "read_picture", "refuse_endless_file", "show_path"]

Size = tuple[float | None, float | None]  # width and height; None: nothing is said of it

_ORIENTATION = 274  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = (5, 6, 7, 8)  # orientations that exchange width and height

_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # of Pillow: more than 8 bits in a channel
_ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "GIF": b";"}  # of whole files
_TAIL = 64  # bytes at the end of a file in which its end mark is; some writers add a few

_RESTORE = "Restore the file, or remove its record."
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Header:
    """A picture as it describes itself, without its pixels.

    Args:
        stored: width and height of the pixels in the file.
        shown: the two after the rotation that EXIF data ask for.
        is_suspect: the file may be cut off, or hold values that do not fit into 8 bits: only reading it tells.
    """

    stored: tuple[int, int]
    shown: tuple[int, int]
    is_suspect: bool


def read_image(path: str | os.PathLike[str], image_format: str | None, size: Size = (None, None)) -> np.ndarray:
    """The pixels of a picture.

    Args:
        path: a file, or an address that Detectron2's PathManager knows.
        image_format: INPUT.FORMAT, a mode of Pillow's or "BGR" or "YUV-BT.601".
        size: width and height of the record.

    Returns:
        [H, W, C], as Detectron2's `read_image` gives it.

    Raises:
        DatasetError: it is no whole picture, has another size, or values that do not fit into 8 bits.
    """
    path = os.fspath(path)
    with _naming(path), _open(path) as file, Image.open(file) as image:
        _check_size(path, image, size)
        turned = _turn(image, size)

        if turned.mode in _WIDE_MODES and image_format not in (*_WIDE_MODES, None):
            _check_values(path, np.asarray(turned))
        pixels = convert_PIL_to_numpy(turned, image_format)

    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def read_picture(record: Mapping[str, Any], image_format: str | None) -> np.ndarray:
    """The pixels of a record's picture, corrupted if the record names a corruption.

    Args:
        record: "file_name", and "width", "height", "corruption" and "severity" if it has them.
        image_format: see `read_image`.

    Returns:
        [H, W, C]. A corruption is a function of the file's name, without its folder, the corruption and the severity.

    Raises:
        DatasetError: see `read_image` and `corrupt`.
    """
    path = os.fspath(record["file_name"])
    size = (record.get("width"), record.get("height"))
    if not record.get("corruption"):
        return read_image(path, image_format, size)

    from bnext.data.corruptions.corrupt import corrupt  # SciPy, which not everybody has

    name, severity = record["corruption"], record["severity"]
    pixels = read_image(path, "RGB", size)
    corrupted = corrupt(pixels, name, severity, _derive_seed(path, name, severity), where=show_path(path))
    pixels = convert_PIL_to_numpy(Image.fromarray(corrupted), image_format)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _derive_seed(path: str, name: str, severity: int) -> int:
    words = f"{os.path.basename(path)}/{name}"  # no file has a slash in its name
    digest = hashlib.sha256(words.encode(errors="surrogateescape")).digest()
    return derive_seed(Purpose.CORRUPT, int.from_bytes(digest[:8], "big"), severity)


def read_header(path: str, *, thorough: bool = False) -> Header:
    """The header of a picture; see `read_image` for the errors.

    Args:
        path: see `read_image`.
        thorough: look for EXIF data behind the pixels of a PNG, too, for which Pillow decodes them.

    Note:
        A few reads of the disk: the beginning of the file, and its last bytes.
    """
    with _naming(path), _open(path) as file, Image.open(file) as image:
        has_late_data = image.format == "PNG" and "exif" not in image.info
        turn = _find_turn(image) if thorough or not has_late_data else None
        width, height = image.size
        shown = (height, width) if turn in _SWAPPING else (width, height)

        end = _ENDS.get(image.format or "")
        is_suspect = image.mode in _WIDE_MODES or end is None or end not in _read_tail(file)
        return Header((width, height), shown, is_suspect)


def refuse_endless_file(path: object) -> None:
    """Raise DatasetError for a pipe, a socket or a device, for whose end a reader would wait for ever.

    Args:
        path: the file name of a record, if it is one.
    """
    if not isinstance(path, (str, os.PathLike)) or "://" in str(path):
        return

    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # for a mapper of the user's own it may be something else than a path

    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _refuse(str(path), _name_kind(mode))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """A block whose errors name the picture."""
    try:
        yield
    except (BNextError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise _refuse(path, _describe_content(path)) from None
    except Image.DecompressionBombError as error:
        raise _refuse_size(path) from error
    except Exception as error:  # whatever Pillow raises for the many ways in which a file can be broken
        words = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise _refuse(path, " ".join(words.split())) from error


def _refuse(path: str, got: str) -> DatasetError:
    return DatasetError.of("A picture", "be a whole image file", got=got, where=show_path(path), remedy=_RESTORE)


def _refuse_size(path: str) -> DatasetError:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # up to which Pillow only warns
    return DatasetError.of(
        "A picture",
        f"have at most {limit:,} pixels, which Pillow takes for harmless",
        got="more",
        where=show_path(path),
        remedy="Cut it into pictures of the size that the model takes, each with its objects; or, if the file is "
        "trusted, set PIL.Image.MAX_IMAGE_PIXELS = None in the module that registers the set.",
    )


def show_path(path: str) -> str:
    """The path in one line, whatever is in it."""
    return path if path.isprintable() else repr(path)


def _open(path: str) -> Any:
    """The open file; an error for anything that is no regular file."""
    if "://" not in path:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise _refuse(path, _name_kind(mode))
        return open(path, "rb")
    return PathManager.open(path, "rb")


def _name_kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")


def _describe_content(path: str) -> str:
    """The kind of a file that is no image, as far as its first bytes tell."""
    start = b""
    if "://" not in path:
        with open(path, "rb") as file:
            start = file.read(24)

    if not start:
        return "an empty file" if Path(path).is_file() else "something else"
    return f"something else, which begins with {start!r}"


def _read_tail(file: Any) -> bytes:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _TAIL))
    return bytes(file.read())


def _find_turn(image: Image.Image) -> int | None:
    """EXIF's orientation; None where there is none that can be read, as for Detectron2."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:
        return None


def _turn(image: Image.Image, size: Size) -> Image.Image:
    """The picture as it is shown, unless its record gives the size of the stored one."""
    turn = _find_turn(image)
    if turn not in _TURNS:
        return image

    if turn in _SWAPPING and not _fits(image.size[::-1], size):
        return image
    return image.transpose(_TURNS[turn])


def _fits(actual: tuple[int, int], size: Size) -> bool:
    return all(said is None or said == number for said, number in zip(size, actual, strict=True))


def _check_size(path: str, image: Image.Image, size: Size) -> None:
    is_turned = _find_turn(image) in _SWAPPING
    if _fits(image.size, size) or (is_turned and _fits(image.size[::-1], size)):
        return

    width, height = image.size[::-1] if is_turned else image.size
    raise DatasetError.of(
        "A picture",
        f"have the width and height of its record, {size[0]} x {size[1]}",
        got=f"{width} x {height}",
        where=show_path(path),
        remedy="Restore the picture that was annotated, or write its width and height, and boxes of its pixels, into "
        "the record.",
    )


def _check_values(path: str, values: np.ndarray) -> None:
    """Refuse values that 8 bits would clip; whole numbers up to 255 in a wider type are what they are."""
    low, high = float(values.min()), float(values.max())  # NaN where there is one

    is_share = values.dtype.kind == "f" and 0 < high <= 1
    if low >= 0 and high <= 255 and not is_share:
        return

    bits = 8 * values.dtype.itemsize
    kind = "floating point numbers" if values.dtype.kind == "f" else "whole numbers"
    raise DatasetError.of(
        "A picture",
        "have values that fit into 8 bits, 0 to 255",
        got=f"{kind} of {bits} bits, {low:g} to {high:g}",
        where=show_path(path),
        remedy="Write the pictures of the set with 8 bits for each channel, all scaled by one factor (255 for the "
        "largest value that there can be); else they would be white or black.",
    )

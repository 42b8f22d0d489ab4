"""A plain folder of pictures as a data set without labels: for statistics, which need no more."""

from __future__ import annotations

import dataclasses
import os

from detectron2.data import DatasetCatalog

from bnext.data.records import Record
from bnext.errors import DatasetError, Refusal

__all__ = ["ENDINGS", "register_folder"]

# Of file names, whatever their case; a folder may have notes, annotations and thumbnails' databases as well.
ENDINGS = (".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

NO_PICTURE = Refusal(
    DatasetError,
    "A folder of pictures",
    f"have a file that ends in one of {', '.join(ENDINGS)}, itself or in a folder below it",
    "Correct the path; or give the name of a registered data set.",
)
UNREADABLE = Refusal(
    DatasetError,
    "A folder of pictures",
    "be readable, with all below it",
    "Give yourself the right to read it, or choose another.",
)


@dataclasses.dataclass(frozen=True)
class PictureFolder:
    """The records of a folder's pictures, in the order of their paths. Called without arguments, as the catalog does.

    Args:
        path: of the folder; folders below it count, hidden files and folders do not.
    """

    path: str

    def __call__(self) -> list[Record]:
        paths: list[str] = []
        for folder, below, names in os.walk(self.path, onerror=_refuse):
            below[:] = [name for name in below if not name.startswith(".")]
            pictures = [name for name in names if name.lower().endswith(ENDINGS) and not name.startswith(".")]
            paths += [os.path.join(folder, name) for name in pictures]

        if not paths:
            raise NO_PICTURE.of("none", self.path)
        return [{"file_name": path, "image_id": number} for number, path in enumerate(sorted(paths))]


def _refuse(error: OSError) -> None:
    raise UNREADABLE.of(error.strerror or str(error), os.fsdecode(error.filename)) from error


def register_folder(path: str) -> str:
    """Register a folder of pictures, for this process.

    Args:
        path: of the folder.

    Returns:
        The name of its set, which is its whole path.

    Raises:
        DatasetError: there is no picture in it, or a folder that cannot be read.
    """
    name = os.path.realpath(path)
    folder = PictureFolder(name)
    folder()

    if name not in DatasetCatalog:
        DatasetCatalog.register(name, folder)
    return name

"""A corrupted set written once, as pictures and an annotation file: for other programs, and where reading is slow."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import Dataset

from bnext.data.batches import limit_loader_workers, load_batches
from bnext.data.check_coco import check_datasets
from bnext.data.corrupted_sets import find_corruption, mark_corrupted, name_variant
from bnext.data.corruptions.names import check_corruption
from bnext.data.read_image import read_picture
from bnext.data.records import Record, check_registered
from bnext.errors import ConfigError, DatasetError, LaunchError, Refusal
from bnext.files import write_folder, write_json
from bnext.progress import track

__all__ = ["ANNOTATIONS", "PICTURES", "write_corrupted"]

ANNOTATIONS, PICTURES = "annotations.json", "images"  # in the folder

_EXISTS = Refusal(
    ConfigError, "The folder of a corrupted set", "not exist", "Choose another name: nothing is replaced."
)
_NO_FILE = Refusal(
    DatasetError,
    "A set that is written corrupted",
    "have an annotation file in COCO's format",
    "Use the set without files: name it {name}@{corruption}_{severity} in the config.",
)
_CORRUPTED = Refusal(
    DatasetError, "A set that is written corrupted", "be a clean one", "Name the set that the variant is of."
)
_FULL = Refusal(
    LaunchError,
    "The folder of a corrupted set",
    "be on a disk that takes all pictures",
    "Free some space, or choose another folder; nothing is kept of it.",
)


def write_corrupted(
    name: str, corruption: str, severity: int, folder: str | os.PathLike[str], num_loader_workers: int = 0
) -> Path:
    """Write a corrupted copy of a registered set: the same pictures as those of `name@corruption_severity`, as PNG.

    Args:
        name: of the set, which is only read.
        corruption, severity: see `check_corruption`.
        folder: is made, with images/ and annotations.json, whole or not at all.
        num_loader_workers: processes that read and write pictures; 0: this one.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, or the corruption or severity is none.
        DatasetError: the set has no file in COCO's format, or a picture cannot be read or is too small.
        LaunchError: the folder cannot be written.

    Note:
        PNG, as JPEG would be a corruption of its own. The annotations are those of the file, whatever it says beside
        the names of pictures; maps of classes and panoptic pictures are not copied.
    """
    folder = Path(folder)
    check_corruption(corruption, severity)
    check_registered(name)
    if os.path.lexists(folder):
        raise _EXISTS.of(repr(str(folder)))
    if find_corruption(name):
        raise _CORRUPTED.of(repr(name))

    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file"):
        raise _NO_FILE.of("none", repr(name), name=name, corruption=corruption, severity=severity)
    check_datasets([name_variant(name, corruption, severity)], training=False)

    content = json.loads(Path(PathManager.get_local_path(str(metadata.json_file))).read_text(encoding="utf-8"))
    images, targets = content["images"], name_pictures([image["file_name"] for image in content["images"]])
    root = str(metadata.get("image_root") or "")
    records = [{**image, "file_name": os.path.join(root, image["file_name"])} for image in images]
    records = mark_corrupted(records, corruption, severity)

    def write(work: str) -> None:
        for target in targets:
            Path(work, PICTURES, target).parent.mkdir(parents=True, exist_ok=True)

        pictures = _Pictures(records, Path(work, PICTURES), targets)
        batches = [[index] for index in range(len(records))]
        loader = load_batches(pictures, batches, limit_loader_workers(num_loader_workers))
        for _ in track(loader, f"{corruption} {severity}", len(records), "picture"):
            pass

        named = [{**image, "file_name": target} for image, target in zip(images, targets, strict=True)]
        info = content.get("info")
        about = {"corruption": corruption, "severity": severity, "corrupted_set": name}
        content["info"] = {**info, **about} if isinstance(info, dict) else about
        write_json(os.path.join(work, ANNOTATIONS), {**content, "images": named})

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, write)
    except OSError as error:
        raise _FULL.of(error.strerror or str(error), str(folder)) from error
    return folder


class _Pictures(Dataset[int]):
    """Pictures that are read, corrupted and written when they are asked for."""

    def __init__(self, records: Sequence[Record], folder: Path, targets: Sequence[str]) -> None:
        self._records, self._folder, self._targets = records, folder, targets

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> int:
        pixels = read_picture(self._records[index], "RGB")
        file = self._folder / self._targets[index]
        try:
            Image.fromarray(pixels).save(file)
        except OSError as error:
            raise _FULL.of(error.strerror or str(error), str(file)) from error
        return index


def name_pictures(file_names: Sequence[str]) -> list[str]:
    """A name below one folder for each picture, which ends in .png.

    Example:
        >>> name_pictures(["a/1.jpg", "2.png", "2.jpg", "/far/3.jpg", "../4.jpg"])
        ['a/1.png', '2.png.png', '2.jpg.png', '3.png', '4.png']
    """
    names = []
    for file_name in file_names:
        path = PurePosixPath(file_name)
        names.append(PurePosixPath(path.name) if path.is_absolute() or ".." in path.parts else path)

    plain = [str(name.with_suffix(".png")) for name in names]
    counts = Counter(plain)
    return [short if counts[short] == 1 else f"{name}.png" for name, short in zip(names, plain, strict=True)]

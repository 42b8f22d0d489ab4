"""Writes the digits set: a small COCO-format detection and instance segmentation set made on this machine.

Whole or absent: everything is written into a temporary sibling, which takes the set's name at the end.
What the pictures look like is in `bnext.data.digits_images`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

from bnext.data.digits_images import SPLITS, DigitsRecipe, DrawnDigit, draw_picture, load_sources
from bnext.errors import DatasetError
from bnext.files import write_json
from bnext.progress import showing_progress

__all__ = ["CLASSES", "FOLDER", "MANIFEST", "VERSION", "has_digits", "prepare_digits", "read_recipe"]

CLASSES = tuple("0123456789")
FOLDER = "digits"
MANIFEST = "digits.json"
VERSION = 2  # raise it whenever the same arguments give other pictures or annotations
LATER = ("image_style", "image_classes")  # arguments that sets of this version were made without
LOCK = ".digits.lock"
UNFINISHED = "digits-unfinished-"


def prepare_digits(
    root: Path | str, recipe: DigitsRecipe | None = None, *, overwrite: bool = False, progress: bool = True
) -> Path:
    """Make the digits set in `root`/digits, unless it is there with the same arguments.

    Args:
        root: the folder of all data sets, made when missing.
        recipe: the arguments; None: the defaults.
        overwrite: replace the set that is there, whatever its arguments.
        progress: show a progress bar when the standard error stream is a terminal.

    Returns:
        The folder of the set: annotations/instances_{train,val}.json, train/, val/, digits.json.

    Raises:
        DatasetError: another set has the name, the digits find no place, or the folder cannot be written.

    Note:
        The same arguments give the same bytes (with the same versions of NumPy, Pillow and scikit-learn), and
        the first pictures do not depend on how many there are. Processes that prepare the same set wait for
        one another.
    """
    root, folder = Path(root), Path(root) / FOLDER
    recipe = recipe or DigitsRecipe()

    try:
        if _is_there(folder, recipe, overwrite):  # asked without the lock: the folder may be read-only
            return folder

        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root):
            if not _is_there(folder, recipe, overwrite):
                _write(root, recipe, progress)
    except OSError as error:
        raise DatasetError.of(
            "The folder of the digits set",
            "be writable",
            got=error.strerror or str(error),
            where=str(folder),
            remedy="Free some space, or set DETECTRON2_DATASETS to another folder.",
        ) from error
    return folder


def has_digits(root: Path | str) -> bool:
    """Whether a whole digits set, made with any arguments, lies in `root`/digits."""
    folder = Path(root) / FOLDER
    return (folder / MANIFEST).is_file() and not _find_fault(folder)


def read_recipe(folder: Path | str) -> DigitsRecipe:
    """The arguments that the set in `folder` was made with.

    Raises:
        DatasetError: its digits.json is missing, broken, or of another version of bnext.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, recipe = manifest["version"], manifest["recipe"]
        if version == VERSION:
            return DigitsRecipe(**{**recipe, "scale_range": tuple(recipe["scale_range"])})
        got = f"version {version}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"

    raise DatasetError.of(
        "The digits set",
        f"have a {MANIFEST} of version {VERSION}",
        got=got,
        where=str(path),
        remedy="Run `python datasets/prepare_digits.py --overwrite`.",
    )


def _is_there(folder: Path, recipe: DigitsRecipe, overwrite: bool) -> bool:
    """Whether the set is already there as wanted; raises where something else would have to go."""
    if not os.path.lexists(folder):
        return False

    if not (folder / MANIFEST).is_file():
        raise DatasetError.of(
            "The folder of the digits set",
            f"be absent or hold a {MANIFEST}",
            got="a folder without",
            where=str(folder),
            remedy="It was not made by prepare_digits, or lost that file: move it away by hand.",
        )
    if overwrite:
        return False

    difference = _list_differences(read_recipe(folder), recipe)
    if difference:
        raise DatasetError.of(
            "The digits set",
            "have been made with the arguments given",
            got=", ".join(difference),
            where=str(folder),
            remedy="Give its own arguments, another folder, or --overwrite (overwrite=True) to replace it.",
        )

    fault = _find_fault(folder)
    if fault:
        raise DatasetError.of(
            "The digits set",
            "be whole",
            got=fault,
            where=str(folder),
            remedy="Run `python datasets/prepare_digits.py --overwrite` (overwrite=True) to make it again.",
        )
    return True


def _list_differences(present: DigitsRecipe, wanted: DigitsRecipe) -> list[str]:
    pairs = zip(asdict(present).items(), asdict(wanted).values(), strict=True)
    return [f"{key}={value} instead of {wanted_value}" for (key, value), wanted_value in pairs if value != wanted_value]


def _find_fault(folder: Path) -> str:
    """A file of a set that is not as its manifest says; empty when it is whole."""
    try:
        recipe = read_recipe(folder)
        checksums = json.loads((folder / MANIFEST).read_text())["sha256"]

        for split in SPLITS:
            annotations = folder / "annotations" / f"instances_{split}.json"
            if hashlib.sha256(annotations.read_bytes()).hexdigest() != checksums[split]:
                return f"{annotations.name}, which was changed"

            present = set(os.listdir(folder / split))
            file_names = map(_file_name, range(recipe.count(split)))
            missing = [name for name in file_names if name not in present]
            if missing:
                return f"{len(missing)} missing pictures, the first {split}/{missing[0]}"
    except (DatasetError, OSError, KeyError) as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the right to write the set; what killed runs left behind is removed. A dead process holds nothing."""
    path = root / LOCK
    while True:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue  # whoever had the lock before has removed this file; its successor counts

            try:
                for leftover in root.glob(UNFINISHED + "*"):
                    _remove(leftover)
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _write(root: Path, recipe: DigitsRecipe, progress: bool) -> None:
    work, folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root)), root / FOLDER
    total = sum(map(recipe.count, SPLITS))
    try:
        work.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the set from other users

        with showing_progress("drawing digits", total, "picture", is_wanted=progress) as bar:
            checksums = {split: _write_split(work, split, recipe, bar) for split in SPLITS}
        write_json(work / MANIFEST, {"version": VERSION, "recipe": _describe(recipe), "sha256": checksums})

        if os.path.lexists(folder):
            os.replace(folder, work.with_name(work.name + "-old"))
        os.replace(work, folder)
    finally:
        for leftover in root.glob(work.name + "*"):
            _remove(leftover)


def _describe(recipe: DigitsRecipe) -> dict[str, Any]:
    """The recipe as the manifest has it: without what came later than the others, where that is off."""
    defaults = asdict(DigitsRecipe())
    return {key: value for key, value in asdict(recipe).items() if key not in LATER or value != defaults[key]}


def _write_split(work: Path, split: str, recipe: DigitsRecipe, bar: Any) -> str:
    """Write one split's pictures and annotations; the SHA-256 of the annotation file."""
    (work / split).mkdir()
    sources, side = load_sources(split), recipe.image_side
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []

    for index in range(recipe.count(split)):
        # A stream per picture: it does not depend on the pictures before it.
        stream = np.random.SeedSequence([recipe.seed, SPLITS.index(split), index])
        picture, digits = draw_picture(recipe, sources, np.random.default_rng(stream))
        Image.fromarray(picture).save(work / split / _file_name(index))

        images.append({"id": index + 1, "file_name": _file_name(index), "height": side, "width": side})
        for digit in digits:
            annotations.append(_annotate(digit, len(annotations) + 1, index + 1))
        bar.update()

    info = {"description": "Handwritten digits of scikit-learn on its sample photographs", "version": str(VERSION)}
    categories = [{"id": k + 1, "name": name, "supercategory": "digit"} for k, name in enumerate(CLASSES)]
    path = work / "annotations" / f"instances_{split}.json"
    write_json(path, {"info": info, "images": images, "annotations": annotations, "categories": categories})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _annotate(digit: DrawnDigit, annotation_id: int, image_id: int) -> dict[str, Any]:
    """The COCO annotation of a drawn digit; box and area are those of its visible pixels."""
    encoded = coco_mask.encode(np.asfortranarray(digit.mask, dtype=np.uint8))

    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": digit.label + 1,
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "area": int(coco_mask.area(encoded)),
        "segmentation": {"size": list(digit.mask.shape), "counts": encoded["counts"].decode("ascii")},
        "iscrowd": 0,
    }


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.png"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

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

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image
from tqdm import tqdm

from bnext.data.digits_images import SPLITS, DigitsRecipe, DrawnDigit, draw_picture, load_sources
from bnext.errors import DatasetError

__all__ = ["CLASSES", "FOLDER", "MANIFEST", "VERSION", "has_digits", "prepare_digits", "read_recipe"]

CLASSES = tuple("0123456789")
FOLDER = "digits"
MANIFEST = "digits.json"
VERSION = 2  # raise it whenever the same arguments give other pictures or annotations
LOCK = ".digits.lock"
UNFINISHED = "digits-unfinished-"


def prepare_digits(
    root: Path | str,
    *,
    seed: int = DigitsRecipe.seed,
    num_train: int = DigitsRecipe.num_train,
    num_val: int = DigitsRecipe.num_val,
    image_side: int = DigitsRecipe.image_side,
    max_objects: int = DigitsRecipe.max_objects,
    scale_range: tuple[float, float] = DigitsRecipe.scale_range,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Make the digits set in `root`/digits, unless it is there with the same arguments.

    Args:
        root: the folder of all data sets, made when missing.
        seed, num_train, num_val, image_side, max_objects, scale_range: see `DigitsRecipe`.
        overwrite: replace the set that is there, whatever its arguments.
        progress: show a progress bar when the standard error stream is a terminal.

    Returns:
        The folder of the set: annotations/instances_{train,val}.json, train/, val/, digits.json.

    Raises:
        DatasetError: an argument is out of range, another set has the name, or the folder cannot be written.

    Note:
        The same arguments give the same bytes (with the same versions of NumPy, Pillow and scikit-learn), and
        the first pictures do not depend on how many there are. Processes that prepare the same set wait for
        one another.
    """
    recipe = DigitsRecipe(seed, num_train, num_val, image_side, max_objects, tuple(scale_range))
    root = Path(root)
    try:
        if _is_there(root / FOLDER, recipe, overwrite):  # asked without the lock: the folder may be read-only
            return root / FOLDER
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root):
            if not _is_there(root / FOLDER, recipe, overwrite):
                _write(root, recipe, progress)
    except OSError as error:
        raise DatasetError(
            f"The folder of the digits set must be writable; got {error.strerror or error} ({root / FOLDER}). "
            "Free some space, or set DETECTRON2_DATASETS to another folder."
        ) from error
    return root / FOLDER


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
        recipe = dict(manifest["recipe"])
        recipe["scale_range"] = tuple(recipe["scale_range"])
        if manifest["version"] == VERSION:
            return DigitsRecipe(**recipe)
        found = f"version {manifest['version']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise DatasetError(
        f"The digits set must have a {MANIFEST} of version {VERSION}; got {found} ({path}). "
        "Run `python datasets/prepare_digits.py --overwrite`."
    )


def _is_there(folder: Path, recipe: DigitsRecipe, overwrite: bool) -> bool:
    """Whether the set is already there as wanted; raises where something else would have to go."""
    if not os.path.lexists(folder):
        return False
    if not (folder / MANIFEST).is_file():
        raise DatasetError(
            f"The folder of the digits set must be absent or hold a {MANIFEST}; got a folder without "
            f"({folder}). It was not made by prepare_digits, or lost that file: move it away by hand."
        )
    if overwrite:
        return False
    found = read_recipe(folder)
    if found != recipe:
        wanted, present = asdict(recipe), asdict(found)
        difference = ", ".join(
            f"{key}={present[key]} instead of {wanted[key]}" for key in wanted if wanted[key] != present[key]
        )
        raise DatasetError(
            f"The digits set must have been made with the arguments given; got {difference} ({folder}). "
            "Give its own arguments, another folder, or --overwrite (overwrite=True) to replace it."
        )
    fault = _find_fault(folder)
    if fault:
        raise DatasetError(
            f"The digits set must be whole; got {fault} ({folder}). "
            "Run `python datasets/prepare_digits.py --overwrite` (overwrite=True) to make it again."
        )
    return True


def _find_fault(folder: Path) -> str:
    """What of a set's files is not as its manifest says; empty when it is whole."""
    try:
        recipe = read_recipe(folder)
        checksums = json.loads((folder / MANIFEST).read_text())["sha256"]
        for split, number in zip(SPLITS, (recipe.num_train, recipe.num_val), strict=True):
            annotations = folder / "annotations" / f"instances_{split}.json"
            if hashlib.sha256(annotations.read_bytes()).hexdigest() != checksums[split]:
                return f"{annotations.name}, which was changed"
            present = set(os.listdir(folder / split))
            missing = [name for name in map(_file_name, range(number)) if name not in present]
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
    work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root))
    try:
        work.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the set from other users
        total = recipe.num_train + recipe.num_val
        with tqdm(total=total, desc="digits", unit="picture", disable=None if progress else True) as bar:
            checksums = {split: _write_split(work, split, recipe, bar) for split in SPLITS}
        _write_json(work / MANIFEST, {"version": VERSION, "recipe": asdict(recipe), "sha256": checksums})
        folder = root / FOLDER
        if os.path.lexists(folder):
            os.replace(folder, work.with_name(work.name + "-old"))
        os.replace(work, folder)
    finally:
        for leftover in root.glob(work.name + "*"):
            _remove(leftover)


def _write_split(work: Path, split: str, recipe: DigitsRecipe, bar: tqdm) -> str:
    """Write one split's pictures and annotations; the SHA-256 of the annotation file."""
    (work / split).mkdir()
    (work / "annotations").mkdir(exist_ok=True)
    sources = load_sources(split)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(recipe.num_train if split == "train" else recipe.num_val):
        # A stream per picture: it does not depend on the pictures before it.
        stream = np.random.SeedSequence([recipe.seed, SPLITS.index(split), index])
        picture, digits = draw_picture(recipe, sources, np.random.default_rng(stream))
        Image.fromarray(picture).save(work / split / _file_name(index))
        side = recipe.image_side
        images.append({"id": index + 1, "file_name": _file_name(index), "height": side, "width": side})
        for digit in digits:
            annotations.append(_annotate(digit, len(annotations) + 1, index + 1))
        bar.update()
    categories = [{"id": k + 1, "name": name, "supercategory": "digit"} for k, name in enumerate(CLASSES)]
    info = {"description": "Handwritten digits of scikit-learn on its sample photographs", "version": str(VERSION)}
    path = work / "annotations" / f"instances_{split}.json"
    _write_json(path, {"info": info, "images": images, "annotations": annotations, "categories": categories})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _annotate(digit: DrawnDigit, annotation_id: int, image_id: int) -> dict:
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


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

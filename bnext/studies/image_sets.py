"""Sets of images for classifiers by their name: digits, and those that a user has on a disk. Nothing is downloaded.

Shape letters: N images, C channels, S side of a picture in pixels.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, ImageFolder

from bnext.errors import DatasetError, check_choice
from bnext.studies.images import Images, load_images

__all__ = ["IMAGE_SETS", "StoredImages", "load_image_set"]

IMAGE_SETS = ("digits", "mnist", "cifar10", "folder")
_TORCHVISION = {"mnist": MNIST, "cifar10": CIFAR10}
_READERS = 8  # threads


class StoredImages:
    """Pictures on a disk, read when they are selected: of each the middle square, resized.

    Args:
        files: of the pictures.
        labels: [N].
        side: S.
    """

    def __init__(self, files: list[str], labels: Tensor, side: int) -> None:
        self.files, self.labels, self.side, self.domain = files, labels, side, ""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Images:
        """Some of them, in the order of the index; pixels [N, 3, S, S], 0 to 1."""
        with ThreadPoolExecutor(_READERS) as readers:
            pictures = list(readers.map(self._read, index.tolist()))
        return Images(torch.stack(pictures), self.labels[index])

    def _read(self, number: int) -> Tensor:
        with Image.open(self.files[number]) as file:
            picture = file.convert("RGB")

        width, height = picture.size
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        box = (left, top, left + square, top + square)
        pixels = np.asarray(picture.resize((self.side, self.side), Image.Resampling.BILINEAR, box=box))
        return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def load_image_set(
    dataset: str, split: str, *, root: str = "", side: int | None = None, limit: int | None = None
) -> Images | StoredImages:
    """Images of a split of a set.

        digits:   1,437 and 360 handwritten digits of scikit-learn; see `load_images`
        mnist:    60,000 and 10,000, from `root`/MNIST/raw
        cifar10:  50,000 and 10,000, from `root`/cifar-10-batches-py
        folder:   pictures in `root`/train/CLASS/ and `root`/val/CLASS/, as ImageNet's, read when they are needed

    Args:
        dataset: name, as above.
        split: "train" or "val".
        root: folder of the set; digits need none.
        side: S; None: 16 for digits, as they are for MNIST and CIFAR-10, 224 for a folder.
        limit: so many of the first images; None: all.

    Raises:
        ConfigError: a set or a split that there is not.
        DatasetError: the set is not on this machine; says how to get it.
    """
    check_choice("dataset", dataset, IMAGE_SETS, where="load_image_set")
    check_choice("split", split, ("train", "val"), where="load_image_set")

    if dataset == "digits":
        return load_images(split, side=side or 16, limit=limit)
    if dataset == "folder":
        return _open_folder(split, root, side or 224, limit)
    return _load_from_torchvision(dataset, split, root, side, limit)


def _load_from_torchvision(dataset: str, split: str, root: str, side: int | None, limit: int | None) -> Images:
    try:
        images: Any = _TORCHVISION[dataset](root or ".", train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        name = _TORCHVISION[dataset].__name__
        words = f"from torchvision.datasets import {name}; {name}('{root or '.'}', download=True)"
        remedy = f'Get it with `python -c "{words}"`, or say with root=... where it is.'
        thing, rule = f"The data set {dataset!r}", "be on this machine"
        raise DatasetError.of(thing, rule, got=str(error), where=f"root {root or '.'!r}", remedy=remedy) from error

    pixels = torch.as_tensor(images.data)[:limit].float() / 255
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    if side is not None and side != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    return Images(pixels.contiguous(), torch.as_tensor(images.targets)[:limit])


def _open_folder(split: str, root: str, side: int, limit: int | None) -> StoredImages:
    path = os.path.join(root, split)
    try:
        images = ImageFolder(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "Say with root=... where the folders train and val are; ImageNet's come from https://image-net.org."
        rule = "have a folder for each class, with pictures in it"
        raise DatasetError.of("The folder of a split", rule, got=str(error), where=path, remedy=remedy) from error

    samples = images.samples
    if limit is not None and limit < len(samples):  # of all classes, not the first ones
        samples = [samples[place] for place in np.linspace(0, len(samples) - 1, limit).astype(int)]
    return StoredImages([file for file, _ in samples], torch.tensor([label for _, label in samples]), side)

"""Batches in the forms in which loaders give them: one image of a batch alone, and the pixels of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnext.distributed import count_images
from bnext.functional import Moments, batch_moments, stack_parts

__all__ = ["list_images", "measure_images", "take_one"]

_MOST_CHANNELS = 4  # of a picture; more are features


def take_one(batch: Any, index: int) -> Any:
    """A batch of one image of a batch; None where that is not known of its form.

    Args:
        batch: as `count_images` knows it.
        index: of the image.
    """
    one = _slice(batch, slice(index, index + 1))
    return one if count_images(one) == 1 else None


def _slice(part: Any, index: slice) -> Any:
    if isinstance(part, Mapping):
        return {name: _slice(value, index) for name, value in part.items()}
    if isinstance(part, Tensor):
        return part[index] if part.dim() else part
    if not isinstance(part, (list, tuple)):
        return part
    return type(part)([_slice(entry, index) for entry in part]) if _is_pair(part) else part[index]


def _is_pair(entries: Any) -> bool:
    """Whether these are (inputs, labels), and not the images of a batch."""
    first = entries[0] if entries else None
    return isinstance(first, (list, tuple)) or (isinstance(first, Tensor) and first.dim() not in (0, 3))


def list_images(batch: Any) -> list[Tensor]:
    """The images [C, H, W] of a batch; empty where none are seen in it.

    Args:
        batch: a tensor [N, C, H, W], a list of images, records with "image", or one of them with labels.
    """
    if isinstance(batch, Tensor):
        images = list(batch) if batch.dim() == 4 else [batch]
        return [image for image in images if image.dim() == 3 and 0 < len(image) <= _MOST_CHANNELS]
    if isinstance(batch, Mapping):
        parts = [batch["image"]] if "image" in batch else list(batch.values())
        return next(filter(None, map(list_images, parts)), [])
    if not isinstance(batch, (list, tuple)) or not batch:
        return []

    images = []
    for entry in batch[:1] if _is_pair(batch) else batch:
        images += list_images(entry)
    return images


def measure_images(images: list[Tensor]) -> Moments | None:
    """Moments of each image: count [N], mean and var [N, C]; None: there are none, or channels differ."""
    if len({len(image) for image in images}) != 1:
        return None
    return stack_parts([Moments(*map(_to_cpu, batch_moments(image.detach().double()[None]))) for image in images])


def _to_cpu(field: Tensor) -> Tensor:
    return field.cpu()

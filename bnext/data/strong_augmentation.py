"""Strong augmentation of pixels: colours, grey and blur, after which every box and mask is where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, GaussianBlur, RandomApply, RandomGrayscale

from bnext.seeding import seeded

__all__ = ["augment_strongly"]

_COLOURS = ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
_BLUR = GaussianBlur(kernel_size=5, sigma=(0.1, 2.0))
_STRONG = Compose([RandomApply([_COLOURS], p=0.8), RandomGrayscale(p=0.2), RandomApply([_BLUR], p=0.5)])


def augment_strongly(batch: Sequence[dict[str, Any]], seed: int, image_format: str = "BGR") -> list[dict[str, Any]]:
    """Copies of records whose images have other colours and sharpness; labels are those of the originals.

    Args:
        batch: records with "image" [C, H, W] of uint8, or of float from 0 to 255; left as they are.
        seed: 0 or more: of all that is drawn.
        image_format: as INPUT.FORMAT says; colours are changed as such where there are three channels.

    Source:
        As in SimCLR (Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, 2020), but
        without crops and flips, which would move boxes, and with a blur of 5 x 5 pixels.
    """
    with seeded(seed):
        return [{**record, "image": _augment(record["image"], image_format)} for record in batch]


def _augment(image: Tensor, image_format: str) -> Tensor:
    flips = image_format == "BGR" and image.shape[0] == 3
    pixels = (image.flip(0) if flips else image).to(torch.uint8)
    augmented = _STRONG(pixels)
    return (augmented.flip(0) if flips else augmented).to(image.dtype)

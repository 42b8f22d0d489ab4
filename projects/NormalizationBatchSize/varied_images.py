"""Images that are moved, mirrored and of a contrast of their own, and batches of them.

Shape letters: N images, C channels, S side of a picture in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from size_setting import SizeSetting
from torch import Tensor

from bnext.studies.images import Images, Selectable

__all__ = ["PixelBatches", "VariedImages"]


class VariedImages:
    """Pictures in a random order, each varied in its own way, the same way whenever it is selected.

    Args:
        images: [N, C, S, S], of which they are made.
        setting: how far they are moved; its device.
        contrast: the factor of a picture is exp(contrast * z), z standard normal.
        seed: of the order and the variation.
        repeats: pictures of an image.
        most: pictures at most; None: all.
        flips: whether half are mirrored.
    """

    def __init__(
        self,
        images: Selectable,
        setting: SizeSetting,
        contrast: float,
        seed: int,
        *,
        repeats: int = 1,
        most: int | None = None,
        flips: bool = False,
    ) -> None:
        self._images, self._device, self._shift = images, setting.device, setting.shift
        generator = torch.Generator().manual_seed(seed)

        self._order = torch.randperm(len(images) * repeats, generator=generator)[:most] % len(images)
        number = len(self._order)
        self._factors = torch.exp(contrast * torch.randn(number, generator=generator))
        self._starts = torch.randint(0, 2 * self._shift + 1, (number, 2), generator=generator)
        self._is_flipped = (torch.rand(number, generator=generator) < 0.5) & flips
        self.labels = images.labels[self._order.to(images.labels.device)]

    def __len__(self) -> int:
        return len(self._order)

    def select(self, index: Tensor) -> Images:
        """Some of them, in the order of the index."""
        index = index.cpu()
        batch = self._images.select(self._order[index]).to(self._device)

        pixels = self._move(batch.pixels, self._starts[index])
        is_flipped = self._is_flipped[index].to(pixels.device)
        pixels = torch.where(is_flipped[:, None, None, None], pixels.flip(3), pixels)
        factors = self._factors[index].to(pixels.device)
        return dataclasses.replace(batch, pixels=pixels * factors[:, None, None, None])

    def _move(self, pixels: Tensor, starts: Tensor) -> Tensor:
        """Each picture moved by its own number of pixels; black comes in."""
        side = pixels.shape[-1]
        padded = F.pad(pixels, (self._shift,) * 4).permute(0, 2, 3, 1)

        places = (starts[:, :, None] + torch.arange(side)).to(pixels.device)
        numbers = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        moved = padded[numbers, places[:, 0, :, None], places[:, 1, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


class PixelBatches:
    """Pixels of images in batches of a size, without labels, as a re-estimation reads them; may be read again.

    Args:
        images: their number is a multiple of the size.
        size: images of a batch.
    """

    def __init__(self, images: Selectable, size: int) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return len(self._images) // self._size

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.arange(len(self._images)).split(self._size):
            yield self._images.select(index).pixels

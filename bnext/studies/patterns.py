"""Mini-batches whose normalization batches have a pattern: so many classes, so many images of each.

A net that is trained on them may read from the statistics of a mini-batch what else is in it. Beside the sampler there
are pictures of several digits, whose number is their class, for patterns of more classes than ten.

Shape letters: N images, C channels, S side of a picture in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from bnext.errors import ConfigError
from bnext.seeding import Purpose, derive_seed
from bnext.studies.images import Images, Selectable

__all__ = ["Pattern", "PatternedBatches", "join_images"]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The classes of a normalization batch: `num_classes` different ones, `num_images` of each.

    Args:
        num_classes: K.
        num_images: M.
        share: of the images that are in the pattern, 0 to 1; each of the others is replaced by one of the whole set, at
            random. With 0 all are independent and identically distributed.

    Raises:
        ConfigError: a number is below 1, or the share is outside its range.

    Example:
        >>> Pattern(16, 2).normalization_batch_size, str(Pattern(16, 2))
        (32, '16 x 2')
    """

    num_classes: int
    num_images: int
    share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_images"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, "be 1 or more", got=getattr(self, name), where="Pattern", remedy="Use 2.")
        if not 0 <= self.share <= 1:
            raise ConfigError.of("share", "be from 0 to 1", got=self.share, where="Pattern", remedy="Use 1.")

    @property
    def normalization_batch_size(self) -> int:
        """K M images."""
        return self.num_classes * self.num_images

    def __str__(self) -> str:
        return f"{self.num_classes} x {self.num_images}"


class PatternedBatches:
    """Mini-batches of several normalization batches, one behind the other; the same ones in every pass over them.

    Args:
        images: of which they are.
        pattern: of each normalization batch; its classes are drawn anew for each, and so are the images of a class.
        num_groups: normalization batches of a mini-batch, as of so many workers.
        num_steps: mini-batches.
        seed: of what is drawn.
        shuffled: whether the images of a mini-batch change places at random, so that its normalization batches have
            no pattern.
        noise: standard deviation of what is added to each pixel.

    Raises:
        ConfigError: the images have too few classes of enough images.

    Example:
        >>> images = Images(torch.zeros(40, 1, 8, 8), torch.arange(40) % 10)
        >>> batch = next(iter(PatternedBatches(images, Pattern(5, 2), num_groups=3)))
        >>> len(batch), batch.labels[:10].bincount().unique().tolist()
        (30, [0, 2])
    """

    def __init__(
        self,
        images: Selectable,
        pattern: Pattern,
        *,
        num_groups: int = 1,
        num_steps: int = 100,
        seed: int = 0,
        shuffled: bool = False,
        noise: float = 0.0,
    ) -> None:
        self.images, self.pattern, self.num_groups, self.num_steps = images, pattern, num_groups, num_steps
        self.seed, self.shuffled, self.noise = seed, shuffled, noise

        labels = images.labels.cpu()
        members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        self._members = [numbers for numbers in members if len(numbers) >= pattern.num_images]

        if pattern.num_classes > len(self._members):
            thing, rule = "num_classes", f"be at most the {len(self._members)} classes of {pattern.num_images} images"
            remedy = "Choose fewer classes, fewer images of each, or a larger set."
            raise ConfigError.of(thing, rule, got=pattern.num_classes, where="PatternedBatches", remedy=remedy)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Images]:
        for step in range(self.num_steps):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.SHUFFLE, step))

            index = torch.cat([self._draw_group(generator) for _ in range(self.num_groups)])
            if self.shuffled:
                index = index[torch.randperm(len(index), generator=generator)]

            batch = self.images.select(index)
            if self.noise:
                added = self.noise * torch.randn(batch.pixels.shape, generator=generator)
                batch = dataclasses.replace(batch, pixels=batch.pixels + added.to(batch.pixels.device))
            yield batch

    def _draw_group(self, generator: torch.Generator) -> Tensor:
        """The images of a normalization batch [K M], class by class."""
        pattern, parts = self.pattern, []
        for number in torch.randperm(len(self._members), generator=generator)[: pattern.num_classes].tolist():
            members = self._members[number]
            parts.append(members[torch.randperm(len(members), generator=generator)[: pattern.num_images]])

        index = torch.cat(parts)
        others = torch.randperm(len(index), generator=generator)[round(pattern.share * len(index)) :]
        index[others] = torch.randint(len(self.images), (len(others),), generator=generator)
        return index


def join_images(images: Images, number: int, count: int, seed: int = 0) -> Images:
    """Pictures of several digits side by side, whose class is the number that they read: 10 ** `number` classes.

    Args:
        images: of one digit each.
        number: of digits on a picture.
        count: pictures N; every class comes equally often, or once more than another.
        seed: of the digits that are taken.

    Returns:
        Pixels [N, C, S, `number` S].

    Example:
        >>> images = Images(torch.arange(10.0)[:, None, None, None].expand(10, 1, 2, 2), torch.arange(10))
        >>> joined = join_images(images, 2, 100)
        >>> int(joined.labels[42]), joined.pixels[42, 0, 0].tolist()
        (42, [4.0, 4.0, 2.0, 2.0])
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, Purpose.AUXILIARY))
    members = [(images.labels == digit).nonzero()[:, 0] for digit in range(10)]
    classes = torch.arange(count) % 10**number

    columns = []
    for place in range(number):
        digits = classes // 10 ** (number - 1 - place) % 10
        chosen = torch.zeros(count, dtype=torch.long)
        for digit, numbers in enumerate(members):
            wanted = (digits == digit).nonzero()[:, 0]
            chosen[wanted] = numbers[torch.randint(len(numbers), (len(wanted),), generator=generator)]
        columns.append(images.pixels[chosen])
    return Images(torch.cat(columns, 3), classes, images.domain)

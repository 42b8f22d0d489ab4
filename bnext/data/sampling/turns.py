"""Whose turn it is: domains one after the other, each as often as its weight says.

Any turn can be told without a walk through all that came before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from bnext.seeding import Purpose, derive_seed

__all__ = ["DrawnTurns", "EvenTurns", "Turns"]

_BLOCK = 1024  # turns that are drawn together


class Turns(Protocol):
    """Domains, by their numbers, one after the other without an end."""

    def count_before(self, turn: int) -> list[int]:
        """Turns that each domain has had before this one."""

    def follow(self, turn: int) -> Iterator[int]:
        """The domains of this turn and of all that come after it."""


class EvenTurns:
    """Turns that are spread as evenly as they can be: number j of a domain with weight w comes at (j + 1/2) / w.

    Among the first n turns, a domain with share p of the weights has n p, up to 1/2 + p (D - 2) / 2 (D domains). Of
    every run of W turns that begins at a multiple of W, the sum of the weights, it has exactly its weight.

    Args:
        weights: whole numbers of 1 or more, one for each domain.

    Example:
        >>> turns = EvenTurns([3, 1]).follow(0)
        >>> [next(turns) for _ in range(8)]
        [0, 0, 1, 0, 0, 0, 1, 0]

    Source:
        Webster's and Sainte-Laguë's method, by which parliaments deal out seats one by one.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = weights

    def count_before(self, turn: int) -> list[int]:
        start = max(0, turn - len(self.weights))  # whose shares, rounded down, nobody has missed by then
        counts = [start * weight // sum(self.weights) for weight in self.weights]

        for _ in range(turn - sum(counts)):
            counts[self._find_next(counts)] += 1
        return counts

    def follow(self, turn: int) -> Iterator[int]:
        counts = self.count_before(turn)
        while True:
            domain = self._find_next(counts)
            counts[domain] += 1
            yield domain

    def _find_next(self, counts: Sequence[int]) -> int:
        times = [(2 * count + 1) / weight for count, weight in zip(counts, self.weights, strict=True)]
        return times.index(min(times))


class DrawnTurns:
    """Turns that are drawn at random, each with the weights as chances.

    Args:
        weights: whole numbers of 1 or more, one for each domain.
        seed: an integer of 0 or more.
    """

    def __init__(self, weights: Sequence[int], seed: int) -> None:
        self.weights = weights
        self.seed = seed

    def count_before(self, turn: int) -> list[int]:
        counts = np.zeros(len(self.weights), int)
        for block in range(turn // _BLOCK + 1):
            drawn = self._draw(block)[: turn - block * _BLOCK]
            counts += np.bincount(drawn, minlength=len(counts))
        return counts.tolist()

    def follow(self, turn: int) -> Iterator[int]:
        block, offset = divmod(turn, _BLOCK)
        while True:
            yield from self._draw(block)[offset:].tolist()
            block, offset = block + 1, 0

    def _draw(self, block: int) -> np.ndarray:
        generator = np.random.default_rng(derive_seed(self.seed, Purpose.DRAW_DOMAIN, block))
        chances = np.array(self.weights) / sum(self.weights)
        return generator.choice(len(chances), size=_BLOCK, p=chances)

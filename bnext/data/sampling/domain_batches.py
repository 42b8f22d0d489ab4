"""Batches in which every domain has its share: of the images of each batch, or of the batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from bnext.data.sampling.samplers import BatchSampler, Sample, shuffle_forever
from bnext.data.sampling.turns import DrawnTurns, EvenTurns, Turns
from bnext.seeding import Purpose, derive_seed

__all__ = ["DomainBatches", "DomainBatchSampler"]

DomainBatches = Literal["composed", "alternating", "random_domain"]


class DomainBatchSampler(BatchSampler):
    """Endless batches in which every domain has its share.

    Each domain has a stream of its own images: every one once, in random order, then again in another. The next images
    of a batch are taken from the domain whose turn it is (`EvenTurns`, `DrawnTurns`).

        composed       a turn is an image: every batch has all domains, in the same numbers where these are whole
        alternating    a turn is a batch of one domain; all have their turns as evenly as can be
        random_domain  likewise, but each turn is drawn

    A batch here goes through the model together: a micro-batch, where gradients are accumulated. Each worker has a part
    of it, another one in each iteration, so that all come to see all domains. The union over workers does not depend
    on their number.

    Args:
        domains: of each image in the data set.
        total_batch_size: see `BatchSampler`.
        weights: domain -> whole number of 1 or more, in proportion to its share of the turns; of all `domains`.
        kind: see above.
        num_micro_batches: of a batch; divides the images of a worker.
        seed, rank, world_size, start_iteration: see `BatchSampler`.

    Example:
        >>> domains = ["day"] * 8 + ["night"] * 4
        >>> sampler = DomainBatchSampler(domains, 4, weights={"day": 3, "night": 1}, kind="composed", seed=0)
        >>> [domains[index] for _, index in next(iter(sampler))]
        ['day', 'day', 'night', 'day']
    """

    def __init__(
        self,
        domains: Sequence[str],
        total_batch_size: int,
        *,
        weights: Mapping[str, int],
        kind: DomainBatches,
        num_micro_batches: int = 1,
        **options: int,
    ) -> None:
        super().__init__(len(domains), total_batch_size, **options)
        self.domains = domains
        self.weights = dict(weights)
        self.kind = kind
        self.num_micro_batches = num_micro_batches

        self.members: dict[str, list[int]] = {domain: [] for domain in weights}
        for index, domain in enumerate(domains):
            self.members[domain].append(index)

    def __iter__(self) -> Iterator[list[Sample]]:
        stream = self._follow(self.start_iteration * self.total_batch_size)
        size = self.total_batch_size // self.num_micro_batches
        share = size // self.world_size

        for iteration in itertools.count(self.start_iteration):
            first = (self.rank + iteration) % self.world_size * share
            batch = []
            for _ in range(self.num_micro_batches):
                batch += list(itertools.islice(stream, size))[first : first + share]
            yield batch

    def _follow(self, position: int) -> Iterator[Sample]:
        """The stream of all workers, from a position on that is the first of a batch."""
        size = 1 if self.kind == "composed" else self.total_batch_size // self.num_micro_batches  # of a turn
        turns, members = self._build_turns(), list(self.members.values())

        streams = []
        for domain, count in enumerate(turns.count_before(position // size)):
            seed = derive_seed(self.seed, Purpose.SHUFFLE_DOMAIN, domain)
            streams.append(shuffle_forever(len(members[domain]), seed, count * size))

        for domain in turns.follow(position // size):
            for _, place in itertools.islice(streams[domain], size):
                yield position, members[domain][place]
                position += 1

    def _build_turns(self) -> Turns:
        weights = list(self.weights.values())
        return DrawnTurns(weights, self.seed) if self.kind == "random_domain" else EvenTurns(weights)

    def list_alike(self, index: int) -> Sequence[int]:
        return self.members[self.domains[index]]

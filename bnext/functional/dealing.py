"""Deal samples out at random, as shuffle BN deals RoIs: evenly, and the same on every worker that knows the seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["deal_samples"]


def deal_samples(num_samples: Sequence[int], num_groups: int, seed: int) -> list[Tensor]:
    """Deal the samples of all workers out to groups; the sizes of the groups differ by at most one.

        group of sample i = permutation[i] mod G,  i over the samples of all workers in their order

    Args:
        num_samples: of each worker, N_r; some may be 0.
        num_groups: G, 1 or more; groups beyond the number of samples stay empty.
        seed: 0 to 2**63 - 1, of which torch takes the lower 32 bits; the same arguments give the same deal.

    Returns:
        For each worker the group of each of its samples, [N_r], 0 to G - 1, on the CPU.

    Example:
        >>> deal = torch.cat(deal_samples([3, 0, 4], 2, seed=1))
        >>> sorted(deal.bincount().tolist())
        [3, 4]
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    deal = torch.randperm(sum(num_samples), generator=generator, device="cpu") % num_groups
    return list(deal.split(list(num_samples)))

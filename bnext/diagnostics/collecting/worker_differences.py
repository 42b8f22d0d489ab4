"""Distances between the running statistics of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnext.diagnostics.facts import NormFacts
from bnext.distributed import resolve_group
from bnext.distributed.collectives import all_gather_objects

__all__ = ["compare_workers"]

Statistics = tuple[Tensor, Tensor]


def compare_workers(norms: Sequence[NormFacts]) -> Mapping[str, float] | None:
    """Path -> largest distance of the running means of two workers: mean over channels, in standard deviations.

    Args:
        norms: of this worker; those that some worker has not, or has otherwise, are passed over.

    Returns:
        The same on all workers; infinite where a single one has numbers that are none. None: one worker runs.

    Note:
        A collective over all workers; some 16 bytes per channel travel.
    """
    group = resolve_group("all")
    if group is None:
        return None

    mine = {(norm.path, part.owner): (part.mean, part.var) for norm in norms for part in norm.populations}
    every: list[dict[tuple[str, str], Statistics]] = all_gather_objects(mine, group)

    distances: dict[str, float] = {}
    for path, owner in every[0]:
        parts = [worker[path, owner] for worker in every if (path, owner) in worker]
        if len(parts) == len(every) and len({mean.shape for mean, _ in parts}) == 1:
            distances[path] = max(distances.get(path, 0.0), _measure(parts))
    return distances


def _measure(parts: Sequence[Statistics]) -> float:
    means, variances = (torch.stack(values) for values in zip(*parts, strict=True))
    # Numbers that no worker has are the fault of another check; those that one has not, set the workers apart.
    is_missing = ~means.isfinite()
    means = means.masked_fill(is_missing, 0.0)
    scale = variances.nan_to_num().clamp(min=0).mean(0).sqrt().clamp(min=1e-12)

    if bool((is_missing.any(0) & ~is_missing.all(0)).any()):
        return float("inf")
    if not means.numel():
        return 0.0
    differences = (means.unsqueeze(0) - means.unsqueeze(1)).abs() / scale
    return float(differences.mean(-1).max())

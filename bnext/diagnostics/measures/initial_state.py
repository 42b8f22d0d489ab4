"""Whether the state of a norm is the one with which it was made: nobody trained it, nothing was loaded into it."""

from __future__ import annotations

import torch

from bnext.diagnostics.facts import Affine, NormFacts, Population
from bnext.surgery.check_state import is_unwritten

__all__ = ["find_unwritten", "get_affine", "has_moved", "is_of_frozen", "is_unit"]


def find_unwritten(norm: NormFacts) -> tuple[Population, ...]:
    """The population statistics of a norm that nobody wrote; see `is_unwritten`."""
    unwritten = []
    for population in norm.populations:
        fields = {"running_mean": population.mean, "running_var": population.var}
        if population.num_updates is not None:
            fields["num_batches_tracked"] = torch.tensor(population.num_updates)
        if is_unwritten(fields):
            unwritten.append(population)
    return tuple(unwritten)


def is_of_frozen(population: Population) -> bool:
    """Whether population statistics are those of a frozen norm of detectron2 into which none were loaded: 0, 1 - eps.

    What it does is in its affine then.
    """
    is_below_1 = bool((population.var > 0).all()) and bool((population.var < 1).all())
    return is_below_1 and not bool(population.mean.any())


def get_affine(norm: NormFacts, owner: str) -> Affine | None:
    """The scale and shift of a level or domain: its own, or that of all."""
    affines = {affine.owner: affine for affine in norm.affines}
    return affines.get(owner, affines.get(""))


def is_unit(affine: Affine | None) -> bool:
    """Whether a scale is 1 and a shift 0 in every channel; True where there is none."""
    if affine is None:
        return True
    has_unit_weight = affine.weight is None or bool((affine.weight == 1).all())
    return has_unit_weight and not has_moved(affine)


def has_moved(affine: Affine | None) -> bool:
    """Whether a training or a file has written an affine: its shift, as initial scales may be 0 or drawn at random."""
    return affine is not None and affine.bias is not None and bool(affine.bias.any())

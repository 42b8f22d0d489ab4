"""Whether the state of a norm is the one with which it was made: nobody trained it, nothing was loaded into it."""

from __future__ import annotations

import dataclasses

import torch

from bnext.diagnostics.facts import Affine, NormFacts, Population
from bnext.surgery.check_state import is_unwritten

__all__ = [
    "drop_initial",
    "find_unwritten",
    "get_affine",
    "has_moved",
    "is_of_frozen",
    "is_unit",
    "is_young",
    "weigh_initial",
]


# A training that has just begun: weights change fast, and statistics follow them. The mini-batches are those in which
# a momentum of 0.1 forgets; one so small that it has not after a hundred is a fault.
_REST, _BEGINNING = 2e-3, 100


def find_unwritten(norm: NormFacts) -> tuple[Population, ...]:
    """The population statistics of a norm that nobody wrote; see `is_unwritten`.

    Also those that are mean 0 and variance 1 to the digit after mini-batches that were counted: a moving average of
    these never is, so that they were reset, or averaged weights got the counter alone.
    """
    unwritten = []
    for population in norm.populations:
        fields = {"running_mean": population.mean, "running_var": population.var}
        is_exact = not bool(population.mean.any()) and bool((population.var == 1).all())
        if population.num_updates is not None and not is_exact:
            fields["num_batches_tracked"] = torch.tensor(population.num_updates)
        if is_unwritten(fields):
            unwritten.append(population)
    return tuple(unwritten)


def weigh_initial(norm: NormFacts, population: Population) -> float:
    """Weight that mean 0 and variance 1 still have in a moving average that began with them; 0 where nobody counts.

    A counter that begins with statistics of another training makes it too large.
    """
    momentum, number = norm.record.momentum, population.num_updates
    return 0.0 if momentum is None or not number else max(0.0, 1 - momentum) ** number


def drop_initial(norm: NormFacts, population: Population) -> Population:
    """Population statistics without the mean 0 and variance 1 that a moving average began with.

    As they are where it cannot have begun so.
    """
    weight = weigh_initial(norm, population)
    if not 0 < weight < 1 or not bool((population.var >= weight * (1 - 1e-4)).all()):
        return population
    var = ((population.var - weight) / (1 - weight)).clamp(min=0)
    return dataclasses.replace(population, mean=population.mean / (1 - weight), var=var)


def is_young(norm: NormFacts, population: Population) -> bool:
    """Whether a moving average is on its way from the values that it began with, as at the begin of each training."""
    return weigh_initial(norm, population) >= _REST and (population.num_updates or 0) < _BEGINNING


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

"""Expected updates of running statistics, against which checks hold those that were counted."""

from __future__ import annotations

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.layers.sources import is_owned, is_per_domain, is_per_level

__all__ = ["expect_updates", "find_live_norms"]


def find_live_norms(facts: Facts) -> list[NormFacts]:
    """Norms that mini-batches normalize in training, and that keep a population."""
    return [norm for norm in facts.batch_norms if norm.is_by_mini_batch and norm.record.population != "none"]


def expect_updates(facts: Facts, norm: NormFacts) -> int | None:
    """Updates of a population that one forward gives: its mini-batches in a forward; None: not known.

    Args:
        facts: its steps, or the forwards that were run, say how often the norm is called.
        norm: of the model.
    """
    if is_owned(norm.record.population):
        return None if _is_finer(norm.record.statistics, norm.record.population) else 1

    is_apart = norm.record.statistics != "shared"
    if facts.steps is not None and facts.steps.calls and not is_apart:
        return facts.steps.calls.get(norm.path, 1)

    numbers = []
    for forward in facts.forwards:
        calls = forward.calls.get(norm.path, ())
        numbers.append(sum(is_apart or not call.is_joint for call in calls))
    if any(numbers):
        return max(numbers)
    return (len(norm.levels) or None) if is_apart else None


def _is_finer(statistics: str, population: str) -> bool:
    """Whether a population of a level or a domain takes in several mini-batches of a call."""
    levels = is_per_level(statistics) and not is_per_level(population)
    domains = is_per_domain(statistics) and not is_per_domain(population)
    return levels or domains

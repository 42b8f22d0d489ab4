"""BN013: running statistics that no mini-batch has ever entered, in a model that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bnext.diagnostics.facts import Facts, NormFacts, Population
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.initial_state import find_unwritten, get_affine, has_moved, is_of_frozen

__all__ = ["CHECK"]

_DRAWN = 0.1  # of the scales are negative; of trained ones hardly any


def _examine(facts: Facts) -> Iterator[Evidence]:
    norms = [norm for norm in facts.batch_norms if _keeps_statistics(norm)]
    folded = () if facts.weights is None else facts.weights.folded

    initial = [norm for norm in norms if norm.path not in folded and _is_left_out(facts, norm)]
    if initial:
        yield _judge_initial(facts, initial, len(norms))

    still = [norm for norm in norms if norm.record.momentum == 0]
    if still:
        yield _judge_still(facts, still, len(norms))


def _keeps_statistics(norm: NormFacts) -> bool:
    return norm.is_by_mini_batch and norm.record.inference == "population" and bool(norm.populations)


def _is_left_out(facts: Facts, norm: NormFacts) -> bool:
    """Whether its affine was trained or loaded, and some of its statistics are those that it was made with.

    New norms on loaded weights have both at their initial values.
    """
    unwritten = [population for population in find_unwritten(norm) if _is_live(facts, population)]
    if facts.weights is not None and facts.weights.is_loaded and norm.path in facts.weights.without_statistics:
        return bool(unwritten)
    return any(has_moved(get_affine(norm, population.owner)) for population in unwritten)


def _is_live(facts: Facts, population: Population) -> bool:
    """Whether mini-batches were to write it; a file does not say so of what nobody counts in it."""
    is_counted = population.num_updates is not None or facts.origin.kind != "checkpoint"
    return is_counted and not is_of_frozen(population)


def _judge_initial(facts: Facts, norms: Sequence[NormFacts], number: int) -> Evidence:
    owners = sorted({population.owner for norm in norms for population in find_unwritten(norm)} - {""})
    of_owners = f" of {', '.join(owners)}" if owners else ""
    text = (
        f"{len(norms)} of {number} batch norms have a scale and shift that were trained, and population "
        f"statistics{of_owners} as they were made (mean 0, variance 1, or all 0): at inference they hardly normalize."
    )

    remedy = Remedy("Estimate them; no weight is trained.", call="bnext.recompute_population_statistics(model, data)")
    if facts.origin.kind != "model" and facts.weights is not None and facts.weights.is_loaded:
        command = facts.origin.write_command("reestimate", "--output", "repaired.pth")
        remedy = Remedy(remedy.text, command=command, call=remedy.call)

    is_known = facts.steps is not None or (facts.weights is not None and facts.weights.is_loaded)
    others_are_written = any(
        population.num_updates or bool(population.mean.any()) for population in _list_populations(facts)
    )
    severity: Severity = "error" if is_known or others_are_written else "warning"
    if severity == "warning" and _are_drawn(norms):
        severity = "note"

    numbers = {"norms": float(len(norms)), "of": float(number)}
    return Evidence(severity, tuple(norm.path for norm in norms), text, remedy, numbers)


def _are_drawn(norms: Sequence[NormFacts]) -> bool:
    """Whether scales were drawn around 0, as RepVGG begins with; those that begin with 1 stay above it."""
    scales = [affine.weight for norm in norms for affine in norm.affines if affine.weight is not None]
    return bool(scales) and float((torch.cat(scales) < 0).double().mean()) > _DRAWN


def _list_populations(facts: Facts) -> list[Population]:
    return [population for norm in facts.batch_norms for population in norm.populations]


def _judge_still(facts: Facts, norms: Sequence[NormFacts], number: int) -> Evidence:
    text = (
        f"{len(norms)} of {number} batch norms have momentum 0: mini-batches normalize in training, and never enter "
        "the running statistics that normalize at inference."
    )
    paths = tuple(norm.path for norm in norms)
    remedy = Remedy(
        "Let statistics move; or freeze them with bnext.freeze_norms, so that they normalize in training as well.",
        call=f"for path in {paths}:\n    model.get_submodule(path).momentum = 0.1",
    )
    severity: Severity = "error" if any(find_unwritten(norm) for norm in norms) else "warning"
    return Evidence(severity, paths, text, remedy, {"norms": float(len(norms)), "of": float(number)})


CHECK = Check(
    code="BN013",
    name="never-updated",
    title="population statistics that nothing was ever written into",
    explanation=(
        "Training goes by mini-batches and looks well; inference goes by mean 0 and variance 1. It happens where "
        "momentum is 0, where a checkpoint was saved or averaged without buffers, where another one had no statistics "
        "(a GroupNorm's), or where a level or domain never came in training. A new norm that nobody has trained yet "
        "has these values rightly."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

"""BN012: channels whose running variance is below eps, which then decides their scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Severity
from bnext.diagnostics.measures.channels import find_dead_channels
from bnext.diagnostics.measures.initial_state import get_affine
from bnext.diagnostics.measures.merged_calls import merge_calls
from bnext.diagnostics.re_estimation import advise_reestimation

__all__ = ["CHECK"]

# Of the channels of one norm, without those that have no scale either. Trained networks have some below eps; fresh
# MobileNets with an eps of 1e-3 have whole norms just below. Where most are far below, the output is next to nothing.
_SOME, _MOST, _FAR = 0.25, 0.75, 0.1


def _examine(facts: Facts) -> Iterator[Evidence]:
    merged = merge_calls(facts, "mini_batch")
    few: dict[str, float] = {}
    most: dict[str, float] = {}
    for norm in facts.batch_norms:
        stored = [(population.owner, population.var) for population in norm.populations]
        live = [("", merged[norm.path].var)] if norm.path in merged else []

        far = _measure(norm, stored + live, _FAR * norm.record.eps)
        below = max(far, _measure(norm, stored, norm.record.eps))
        if far >= _MOST:
            most[norm.path] = far
        elif below >= _SOME:
            few[norm.path] = below

    severities: tuple[tuple[Severity, dict[str, float]], ...] = (("warning", most), ("note", few))
    for severity, seen in severities:
        if not seen:
            continue
        eps = max(norm.record.eps for norm in facts.batch_norms if norm.path in seen)
        text = (
            f"In {len(seen)} of {len(facts.batch_norms)} norms up to {max(seen.values()):.0%} of the channels have a "
            f"variance below eps ({eps:g}): they are divided by the square root of eps, whatever their statistics are."
        )
        words = (
            "If the features are so small on purpose, train with a smaller eps, and keep it: another eps changes the "
            "outputs of a trained model. Else the statistics are not those of these features."
        )
        numbers = {"norms": float(len(seen)), "share": max(seen.values()), "eps": eps}
        yield Evidence(severity, tuple(seen), text, advise_reestimation(facts, seen, words), numbers)


def _measure(norm: NormFacts, variances: Sequence[tuple[str, Tensor]], least: float) -> float:
    """The largest share of channels below a variance; one of 0 is another fault.

    Args:
        norm: with its scales.
        variances: level or domain, and variances of its channels.
        least: variance.
    """
    shares = [0.0]
    for owner, var in variances:
        affine = get_affine(norm, owner)
        dead = find_dead_channels(None if affine is None else affine.weight, len(var))
        is_below = (var > 0) & (var < least) & ~dead
        if len(is_below):
            shares.append(float(is_below.double().mean()))
    return max(shares)


CHECK = Check(
    code="BN012",
    name="variance-below-eps",
    title="variances below eps, which then decides the scale",
    explanation=(
        "A norm divides by `sqrt(var + eps)`. Where the variance is far below eps, the output is far from variance 1, "
        "and an eps that differs between two libraries changes the outputs. Features get so small behind a layer with "
        "tiny weights, or a loss in half precision; a statistic gets so small by a wrong conversion. A few such "
        "channels are dead filters, which trained networks have."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

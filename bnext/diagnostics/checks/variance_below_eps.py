"""BN012: channels whose running variance is below eps, which then decides their scale."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.channels import find_dead_channels
from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Severity
from bnext.diagnostics.initial_state import get_affine
from bnext.diagnostics.re_estimation import advise_reestimation

__all__ = ["CHECK"]

# Of the channels of one norm, without those that have no scale either. Trained networks have some such channels,
# above all with an eps of 1e-3; where they are the most, the input of the whole norm is next to constant.
_SOME, _MOST = 0.25, 0.75


def _examine(facts: Facts) -> Iterator[Evidence]:
    shares = {norm.path: _measure(norm) for norm in facts.batch_norms if norm.record.eps > 0}
    few = {path: share for path, share in shares.items() if _SOME <= share < _MOST}
    most = {path: share for path, share in shares.items() if share >= _MOST}

    severities: tuple[tuple[Severity, dict[str, float]], ...] = (("warning", most), ("note", few))
    for severity, seen in severities:
        if not seen:
            continue
        eps = max(norm.record.eps for norm in facts.batch_norms if norm.path in seen)
        text = (
            f"In {len(seen)} of {len(shares)} norms up to {max(seen.values()):.0%} of the channels have a running "
            f"variance below eps ({eps:g}): they are divided by the square root of eps, whatever their statistics are."
        )
        words = (
            "If the features are so small on purpose, train with a smaller eps, and keep it: another eps changes the "
            "outputs of a trained model. Else the statistics are not those of these features."
        )
        numbers = {"norms": float(len(seen)), "share": max(seen.values()), "eps": eps}
        yield Evidence(severity, tuple(seen), text, advise_reestimation(facts, seen, words), numbers)


def _measure(norm: NormFacts) -> float:
    """The largest share of channels below eps, of all levels and domains; a variance of 0 is another fault."""
    shares = [0.0]
    for population in norm.populations:
        affine = get_affine(norm, population.owner)
        dead = find_dead_channels(None if affine is None else affine.weight, len(population.var))
        is_below = (population.var > 0) & (population.var < norm.record.eps) & ~dead
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

"""By how much a model is worse with its population statistics than with others, on the same images."""

from __future__ import annotations

import dataclasses

from bnext.diagnostics.facts import EvaluationFacts

__all__ = ["Gap", "find_gap"]

# Of a score, in points and relative to the better one. All kinds see the same images, so that repeating moves COCO's
# AP by less than half a point; weights near convergence gain 0.2 points by precise statistics.
_LEAST_POINTS, _LEAST_SHARE = 1.0, 0.03
# Of a loss, in units of it and relative to the better one; a loss near 0 doubles by nothing.
_LEAST_LOSS, _LEAST_LOSS_SHARE = 0.05, 0.1
_WRONG, _WRONG_LOSS = 0.2, 0.5  # of the better score or loss, from which on it is a fault


@dataclasses.dataclass(frozen=True)
class Gap:
    """By how much population statistics are worse than another kind; negative: better.

    Args:
        share: of the other's score or loss.
        points: of the score; None: it is a gap between losses.
        is_seen: whether it is more than chance.
        is_wrong: whether it is so large that results are wrong.
    """

    share: float
    points: float | None
    is_seen: bool
    is_wrong: bool


def find_gap(evaluation: EvaluationFacts | None, kind: str) -> Gap | None:
    """The gap in the score, or in the loss where no score says something; None: it was not measured.

    Args:
        evaluation: of `Facts`.
        kind: "precise" or "mini_batch".
    """
    if evaluation is None:
        return None
    has_score = bool(evaluation.ap) and max(evaluation.ap.values()) >= _LEAST_POINTS
    values = evaluation.ap if has_score else evaluation.losses
    if kind not in values or "population" not in values:
        return None

    here, there = values["population"], values[kind]
    if has_score:
        points = there - here
        share = points / max(there, 1e-12)
        is_seen = points >= _LEAST_POINTS and share >= _LEAST_SHARE
        return Gap(share, points, is_seen, is_seen and share >= _WRONG)

    share = (here - there) / max(abs(there), 1e-12)
    is_seen = not (share < _LEAST_LOSS_SHARE or here - there < _LEAST_LOSS)  # one that is NaN counts
    return Gap(share, None, is_seen, is_seen and not share < _WRONG_LOSS)

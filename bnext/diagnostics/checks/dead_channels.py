"""BN032: channels whose scale is next to nothing, so that nothing of their features gets through."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bnext.diagnostics.facts import Affine, Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.channels import find_dead_channels

__all__ = ["CHECK"]

# Of the channels of one norm. First layers of ImageNet networks have up to a fifth; of half, capacity is lost.
_SOME, _MOST = 0.25, 0.5


def _examine(facts: Facts) -> Iterator[Evidence]:
    shares = {norm.path: _measure(norm) for norm in facts.batch_norms}
    few = {path: share for path, share in shares.items() if _SOME <= share < _MOST}
    most = {path: share for path, share in shares.items() if share >= _MOST}

    severities: tuple[tuple[Severity, dict[str, float]], ...] = (("warning", most), ("note", few))
    for severity, seen in severities:
        if not seen:
            continue
        text = (
            f"In {len(seen)} of {len(shares)} norms up to {max(seen.values()):.0%} of the channels give a constant: "
            "their scale is below a thousandth of that of the strong channels."
        )
        numbers = {"norms": float(len(seen)), "share": max(seen.values())}
        yield Evidence(severity, tuple(seen), text, _advise(facts), numbers)


def _measure(norm: NormFacts) -> float:
    return max((_measure_affine(affine) for affine in norm.affines if affine.weight is not None), default=0.0)


def _measure_affine(affine: Affine) -> float:
    """The share of dead channels; of a layer whose scales are all 0 as they were set, 0."""
    weight = affine.weight
    if weight is None or not len(weight):
        return 0.0
    is_trained = affine.bias is not None and bool(affine.bias.count_nonzero())
    if not bool(weight.count_nonzero()) and not is_trained:
        return 0.0
    return float(find_dead_channels(weight, len(weight)).to(torch.float64).mean())


def _advise(facts: Facts) -> Remedy:
    text = (
        "Such channels can be pruned without a change of outputs. They do not come back by themselves: if nobody "
        "wanted them, train these layers again with a lower learning rate or a warm-up, and without weight decay "
        "of norms."
    )
    decays = bool(facts.get_config("SOLVER.WEIGHT_DECAY_NORM", 0.0))
    return Remedy(text, keys={"SOLVER.WEIGHT_DECAY_NORM": 0.0} if decays else {})


CHECK = Check(
    code="BN032",
    name="dead-channels",
    title="channels without a scale",
    explanation=(
        "A weight of zero makes a channel of a norm's output a constant, and stops the gradient to the layer before. "
        "Weight decay on norms, a learning rate that was too high, or a sparsity penalty bring channels there. The "
        "last norm of a residual branch that starts with weights of zero is on purpose, and pruning is, too."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

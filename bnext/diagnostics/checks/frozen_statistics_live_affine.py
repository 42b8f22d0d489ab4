"""BN005: statistics that were frozen, and a scale and shift that are trained."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy

__all__ = ["CHECK"]

_FREEZE = 'bnext.freeze_norms(model, "affine", select=lambda path, norm: {selected})'


def _examine(facts: Facts) -> Iterator[Evidence]:
    norms = []
    for norm in facts.batch_norms:
        is_trained = any(affine.is_trained for affine in norm.affines)
        is_alone = norm.record.workers in ("one", 1)  # statistics over workers, and frozen, are asked for by nobody
        if norm.record.frozen == "statistics" and is_trained and is_alone:
            norms.append(norm)
    if not norms:
        return

    paths = tuple(norm.path for norm in norms)
    text = (
        f"{len(norms)} of {len(facts.batch_norms)} batch norms normalize by frozen population statistics in training, "
        "and their scale and shift are trained."
    )
    places = sorted({norm.place for norm in norms} - {""})
    keys = {f"MODEL.BNEXT.{place}.FROZEN": "both" for place in places} if facts.origin.kind == "config" else {}
    selected = "not norm.training"
    if any(norm.is_training for norm in norms):
        selected = f"path in {paths}"
    remedy = Remedy(
        "Nothing, if it is on purpose. Freeze the affine too for the FrozenBN of detectron2.",
        keys=keys,
        call=_FREEZE.format(selected=selected),
    )
    yield Evidence("note", paths, text, remedy, {"norms": float(len(norms))})


CHECK = Check(
    code="BN005",
    name="frozen-statistics-live-affine",
    title="frozen statistics, and a scale and shift that are trained",
    explanation=(
        "With its statistics fixed a batch norm is an affine map for each channel, and trains as one. Toolboxes do so "
        "on purpose (`norm_eval=True`); detectron2's FrozenBN freezes both."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

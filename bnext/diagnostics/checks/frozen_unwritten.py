"""BN006: frozen norms with the statistics and the affine that they were made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.initial_state import find_unwritten, get_affine, is_unit

__all__ = ["CHECK"]


def _examine(facts: Facts) -> Iterator[Evidence]:
    weights = facts.weights
    if weights is not None and weights.source and not weights.is_loaded:
        return  # what they give is not known

    frozen = [norm for norm in facts.batch_norms if _is_frozen(norm)]
    unwritten = [norm for norm in frozen if _is_unwritten(norm)]
    if not unwritten:
        return

    text = (
        f"{len(unwritten)} of {len(frozen)} frozen norms have mean 0, variance 1, scale 1 and shift 0: they do not "
        "normalize, and never will."
    )
    severity: Severity = "error"
    if weights is None and not facts.is_trained:
        severity = "warning"
        text += " If a state dict is loaded into them later, they will."
    numbers = {"norms": float(len(unwritten)), "frozen": float(len(frozen))}
    yield Evidence(severity, tuple(norm.path for norm in unwritten), text, _advise(facts, unwritten), numbers)


def _is_frozen(norm: NormFacts) -> bool:
    return norm.record.frozen in ("statistics", "both") and bool(norm.populations)


def _is_unwritten(norm: NormFacts) -> bool:
    """Whether it does nothing: the statistics of some old backbones are in their affine, which does."""
    unwritten = [population.owner for population in find_unwritten(norm)]
    return bool(unwritten) and all(is_unit(get_affine(norm, owner)) for owner in unwritten)


def _advise(facts: Facts, norms: Sequence[NormFacts]) -> Remedy:
    if facts.origin.kind != "config":
        text = "Load weights with statistics, or train with norms that are not frozen; to repair FrozenBatchNorm2d:"
        live = 'bnext.convert_norm(model, {path: "BN" for path in paths})'
        paths = tuple(norm.path for norm in norms)
        return Remedy(text, call=f"paths = {paths}\n{live}\nfor path in paths:\n    model.get_submodule(path).train()")

    live = "SyncBN" if facts.training is not None and (facts.training.num_workers or 1) > 1 else "BN"
    keys: dict[str, object] = {}
    for norm in norms:
        if facts.get_config(f"MODEL.BNEXT.{norm.place}.FROZEN") in ("statistics", "both"):
            keys[f"MODEL.BNEXT.{norm.place}.FROZEN"] = "none"
        elif norm.norm_key:
            keys[norm.norm_key] = live
        if norm.place == "RESNETS":
            keys["MODEL.BACKBONE.FREEZE_AT"] = 0
    text = "Give MODEL.WEIGHTS a file with statistics for them; or train from scratch with norms that are not frozen."
    return Remedy(text, keys=keys)


CHECK = Check(
    code="BN006",
    name="frozen-unwritten",
    title="frozen norms that nothing was loaded into",
    explanation=(
        "A frozen norm normalizes by what a file gave it. One that kept the values of its construction is the "
        "identity: the network has no normalization there at all, activations grow from block to block, and training "
        "diverges in its first steps. Named weights that were not fetched are believed to have statistics."
    ),
    cost="loss 198,440 at the first step",
    source="vision PR#5443, detectron2#914",
    depth="static",
    examine=_examine,
)

"""BN007: norms that are frozen by a switch of something else, while their own setting asks for mini-batches."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy

__all__ = ["CHECK"]

_FREEZE_AT = "MODEL.BACKBONE.FREEZE_AT"
_FROZEN_NAMES = ("", "FrozenBN", None)


def _examine(facts: Facts) -> Iterator[Evidence]:
    yield from _find_frozen_stages(facts)
    yield from _find_still_norms(facts)


def _find_frozen_stages(facts: Facts) -> Iterator[Evidence]:
    """Norms of stages that FREEZE_AT has frozen, in a backbone whose NORM is another."""
    level = facts.get_config(_FREEZE_AT, 0)
    by_key: dict[str, list[NormFacts]] = {}
    for norm in facts.batch_norms:
        if norm.place == "RESNETS" and norm.record.frozen == "both":
            by_key.setdefault(norm.norm_key, []).append(norm)

    for key, norms in by_key.items():
        name = facts.get_config(key)
        if name in _FROZEN_NAMES or not level:
            continue
        total = sum(norm.place == "RESNETS" for norm in facts.batch_norms)
        text = (
            f"{key} is {name}, but {len(norms)} of the {total} batch norms there are frozen, statistics and affine: "
            f"{_FREEZE_AT} is {level}, detectron2's default is 2."
        )
        remedy = Remedy("If all are to be trained, freeze no stage; else nothing is to be done.", keys={_FREEZE_AT: 0})
        paths = tuple(norm.path for norm in norms)
        numbers = {"frozen": float(len(norms)), "norms": float(total)}
        yield Evidence("note", paths, text, remedy, numbers)


def _find_still_norms(facts: Facts) -> Iterator[Evidence]:
    """Norms in evaluation mode within a model in training mode; one that is frozen altogether was meant to be."""
    if not facts.is_training:
        return

    still = [norm for norm in facts.batch_norms if not norm.is_training and norm.populations]
    unasked = [norm for norm in still if not norm.affines or any(affine.is_trained for affine in norm.affines)]
    shared = [norm for norm in unasked if norm.record.workers not in ("one", 1)]
    call = "model.train()  # after whatever has put them into evaluation mode, such as norm_eval=True"

    if shared:
        text = (
            f"{len(shared)} norms that were to share their mini-batches over workers (SyncBN) are in evaluation mode "
            "within a model in training mode: they have no mini-batches, and their statistics are frozen."
        )
        remedy = Remedy("Leave them in training mode; if they are to be frozen, bnext.freeze_norms says so.", call=call)
        yield Evidence("warning", tuple(norm.path for norm in shared), text, remedy, {"norms": float(len(shared))})

    others = [norm for norm in unasked if norm not in shared]
    if others:
        text = (
            f"{len(others)} of {len(facts.batch_norms)} batch norms are in evaluation mode within a model in training "
            "mode, so that their statistics are frozen, while their affine is trained."
        )
        remedy = Remedy("If it is not on purpose, leave them in training mode.", call=call)
        yield Evidence("note", tuple(norm.path for norm in others), text, remedy, {"norms": float(len(others))})


CHECK = Check(
    code="BN007",
    name="frozen-unasked",
    title="norms are frozen by a switch that speaks of something else",
    explanation=(
        "Stages that FREEZE_AT freezes get frozen norms whatever NORM says, and a norm_eval switch leaves norms in "
        "evaluation mode. Both are common on purpose, with a small batch and pre-trained weights. A SyncBN in "
        "evaluation mode is not: whoever asks for a SyncBN wants the mini-batches that it no longer has."
    ),
    cost="",
    source="detectron2#2022, mmdetection#9877",
    depth="static",
    examine=_examine,
)

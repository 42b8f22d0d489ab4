"""BN027: weight decay on the affine of norms, most of all on some and not on others."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy

__all__ = ["CHECK"]

_KEY = "SOLVER.WEIGHT_DECAY_NORM"
_HEADS_OF_OURS = ("RetinaNet", "FCOS")  # of detectron2, whose norms of levels its optimizer does not know for norms


def _examine(facts: Facts) -> Iterator[Evidence]:
    decays = facts.training.weight_decay if facts.training is not None else {}
    decayed = tuple(path for path, decay in decays.items() if decay > 0)
    if not decayed:
        return

    worst = max(decays.values())
    wanted = facts.get_config(_KEY)
    numbers = {"norms": len(decayed), "others": len(decays) - len(decayed), "weight_decay": worst}
    if len(decayed) < len(decays):
        words = f"{len(decayed)} of {len(decays)} norms have a weight decay of up to {worst:g} on scale and shift, the "
        words += "other ones have none: whatever is compared between them is confounded by it."
        yield Evidence("warning", decayed, words, _advise(facts), numbers)
    elif wanted == 0:
        words = f"{_KEY} is 0, and yet {len(decayed)} norms have a weight decay of up to {worst:g} on scale and shift: "
        words += "the optimizer does not know them for norms."
        yield Evidence("warning", decayed, words, _advise(facts), numbers)
    elif wanted is None:
        words = f"All {len(decayed)} norms have a weight decay of up to {worst:g} on scale and shift, as torch does "
        words += "unless it is told otherwise; detectron2 and most recipes for detectors decay none."
        yield Evidence("note", decayed, words, _advise(facts), numbers)


def _advise(facts: Facts) -> Remedy:
    text = "Put scale and shift of all norms into a group of parameters without weight decay."
    call = (
        "norms = {p for m in model.modules() if 'Norm' in type(m).__name__ for p in m.parameters()}\n"
        "for group in list(optimizer.param_groups):  # before a scheduler is built\n"
        "    moved = [p for p in group['params'] if p in norms]\n"
        "    group['params'] = [p for p in group['params'] if p not in norms]\n"
        "    if moved:\n"
        "        optimizer.add_param_group({**group, 'params': moved, 'weight_decay': 0.0})"
    )

    architecture = facts.get_config("MODEL.META_ARCHITECTURE")
    if architecture in _HEADS_OF_OURS:
        text = (
            "Take bnext's architecture, whose norms are norms for detectron2's optimizer; weights and AP are the same."
        )
        return Remedy(text, keys={"MODEL.META_ARCHITECTURE": f"BNext{architecture}"}, call=call)
    return Remedy(text, call=call)


CHECK = Check(
    code="BN027",
    name="decayed-affine",
    title="weight decay on the affine of norms",
    explanation=(
        "A scale that decays changes the effective learning rate of the weights before it, and a decay that some norms "
        "have and others not is a difference that nobody asked for: detectron2's `CycleBatchNormList` is no norm for "
        "its optimizer, so its affine decays and every other norm's does not. All norms decayed alike is a choice."
    ),
    cost="",
    source="detectron2, CycleBatchNormList",
    depth="static",
    examine=_examine,
)

"""The remedy that many checks have: population statistics estimated anew."""

from __future__ import annotations

from collections.abc import Iterable

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Remedy

__all__ = ["advise_precise_statistics", "advise_reestimation"]

_PRECISE_CALL = (
    "from bnext.statistics import recompute_population_statistics\nrecompute_population_statistics(model, data)"
)
_CALL = "bnext.recompute_population_statistics(model, data)  # batches like those of its training"
_FROZEN_CALL = """frozen = {
    path: "BN"
    for group in bnext.find_norm_groups(model)
    if group.records[0].frozen in ("statistics", "both")
    for path in group.paths
}
bnext.convert_norm(model, frozen)
bnext.recompute_population_statistics(model, data)  # batches like those of its training
bnext.freeze_norms(model, select=lambda path, norm: path in frozen)"""
# A frozen backbone is re-estimated as one that is not, and the output loads into the frozen one.
_UNFREEZE = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0")


def advise_reestimation(facts: Facts, paths: Iterable[str], text: str = "") -> Remedy:
    """Estimate the population statistics of some norms anew.

    Args:
        facts: of the model.
        paths: of the norms.
        text: sentences that come first.
    """
    wanted = set(paths)
    norms = [norm for norm in facts.norms if norm.path in wanted]
    frozen = [norm for norm in norms if norm.record.frozen in ("statistics", "both")]
    words = f"{text} Estimate the population statistics anew; no weight is trained.".strip()

    if facts.origin.kind == "model":
        return Remedy(words, call=_FROZEN_CALL if frozen else _CALL)

    pairs: tuple[str, ...] = ()
    if any(norm.place == "RESNETS" for norm in frozen):
        pairs = _UNFREEZE
        words += " The output loads into the frozen backbone."
    if facts.origin.kind == "checkpoint":
        words += " CONFIG.yaml stands for the config that the checkpoint was trained with."
    return Remedy(words, command=facts.origin.write_command("reestimate", "--output", "repaired.pth", pairs=pairs))


def advise_precise_statistics(facts: Facts, text: str) -> Remedy:
    """Estimate all population statistics anew, now and in every training to come.

    Args:
        facts: of the model.
        text: says so.
    """
    if facts.origin.kind != "config":
        return Remedy(text, call=_PRECISE_CALL)

    command = ""
    if facts.weights is not None and facts.weights.is_loaded:
        command = facts.origin.write_command("reestimate", "--output", "reestimated.pth")
    return Remedy(text, {"TEST.PRECISE_BN.ENABLED": True}, command, _PRECISE_CALL)

"""BN010: mini-batches with one element per channel, or hardly more."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.batch_remedies import write_conversion
from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.batch_sizes import count_elements
from bnext.layers.sources import is_per_domain, is_per_level

__all__ = ["CHECK"]

# The standard error of a variance of n independent normal elements is sqrt(2 / n) of it: 35 % with 16, 71 % with 4.
_FEW, _VERY_FEW = 16, 4
_POINTS = 10.0  # of a single one: nothing comes through, which is worse than few samples (BN008)


def _examine(facts: Facts) -> Iterator[Evidence]:
    by_severity: dict[Severity, dict[NormFacts, tuple[int, int]]] = {}
    for norm in facts.batch_norms:
        elements = count_elements(facts, norm)
        if elements is not None and elements[0] < _FEW:
            by_severity.setdefault(_judge(norm, elements[0]), {})[norm] = elements

    for severity, norms in by_severity.items():
        yield _tell(facts, severity, norms)


def _judge(norm: NormFacts, least: int) -> Severity:
    if least == 1 and norm.single_element == "error":
        return "error"
    return "warning" if 1 < least < _VERY_FEW else "note"


def _tell(facts: Facts, severity: Severity, norms: dict[NormFacts, tuple[int, int]]) -> Evidence:
    least = min(least for least, _ in norms.values())
    most = min(most for _, most in norms.values())

    if severity == "error":
        text = (
            f"{len(norms)} batch norms get mini-batches of a single element per channel, which has no variance: torch "
            "refuses it, and where a norm does not, its output is the bias whatever comes in."
        )
    else:
        number = f"{least}" if least == most else f"{least} to {most}"
        text = (
            f"{len(norms)} batch norms get mini-batches of {number} elements per channel; a variance of {least} is "
            f"known to {100 * (2 / least) ** 0.5:.0f} %."
        )

    paths = tuple(norm.path for norm in norms)
    numbers = {"norms": float(len(norms)), "elements": float(least)}
    points = _POINTS if severity == "error" else None
    return Evidence(severity, paths, text, _advise(facts, norms), numbers, points)


def _advise(facts: Facts, norms: dict[NormFacts, tuple[int, int]]) -> Remedy:
    if facts.origin.kind == "config":
        keys: dict[str, object] = {}
        for norm in norms:
            node = f"MODEL.BNEXT.{norm.place}"
            if is_per_level(norm.record.statistics) and f"{node}.STATISTICS" in (facts.config or {}):
                together = "per_domain" if is_per_domain(norm.record.statistics) else "shared"
                keys[f"{node}.STATISTICS"] = keys[f"{node}.POPULATION"] = together
            elif norm.norm_key:
                keys[norm.norm_key] = "GN"
        text = "Normalize all levels together, or take GN; larger images (INPUT.MIN_SIZE_TRAIN), or more, do as well."
        return Remedy(text, keys=keys)

    if all(most >= _FEW for _, most in norms.values()):
        return Remedy(
            "Leave out the last batch of an epoch, which is smaller.",
            call="DataLoader(dataset, batch_size, shuffle=True, drop_last=True)",
        )
    text = "Take GroupNorm, or feed more samples or larger images."
    return Remedy(text, call=write_conversion(facts, list(norms), '"GN"'))


CHECK = Check(
    code="BN010",
    name="single-element",
    title="mini-batches have one element per channel, or hardly more",
    explanation=(
        "What is normalized together is N H W elements per channel. A single one minus its mean is zero, so that the "
        "output is the bias, or an error: a last batch of one sample, a 1 x 1 feature at batch size 1, one RoI. Few "
        "elements, as on the smallest level of a pyramid, have statistics that are mostly noise."
    ),
    cost="",
    source="detectron2#366, detectron2#1807, pytorch#36530",
    depth="forward",
    examine=_examine,
)

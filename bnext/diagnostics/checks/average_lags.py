"""BN026: an average of the weights whose running statistics are not those of the average."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bnext.diagnostics.facts import Facts, NormFacts, Population
from bnext.diagnostics.findings import Check, Evidence, Remedy

__all__ = ["CHECK"]

_APART = 0.5  # standard deviations between means; statistics of neighbouring weights differ by about a tenth of it
_SCALE = 1.1  # |log| of the ratio of variances: a factor of 3
_NEAR = 0.2  # difference of affines, in parts of the scale, up to which averaged weights are neighbours of the model's


def _examine(facts: Facts) -> Iterator[Evidence]:
    pairs = _pair(facts)
    initial: dict[str, float] = {}
    apart: dict[str, float] = {}
    for norm, average in pairs:
        for ours, theirs in zip(norm.populations, average.populations, strict=False):
            if ours.mean.shape != theirs.mean.shape or len(ours.mean) == 0 or not _are_finite(ours, theirs):
                continue
            distance, scale = _measure(ours, theirs)
            if _is_initial(theirs) and not _is_initial(ours):
                initial[norm.path] = max(distance, initial.get(norm.path, 0.0))
            elif (distance > _APART or scale > _SCALE) and _are_near(norm, average):
                apart[norm.path] = max(distance, apart.get(norm.path, 0.0))

    if initial:
        words = f"{len(initial)} of {len(pairs)} norms of the averaged weights have the running statistics of a new "
        words += f"model, mean 0 and variance 1; those of the model are up to {max(initial.values()):.2g} standard "
        words += "deviations away."
        yield Evidence("error", tuple(initial), words, _advise(facts), _count(initial))
    if apart:
        words = f"{len(apart)} of {len(pairs)} norms of the averaged weights have running statistics that are up to "
        words += f"{max(apart.values()):.2g} standard deviations away from the model's, with nearly the same affine."
        yield Evidence("warning", tuple(apart), words, _advise(facts), _count(apart))


def _pair(facts: Facts) -> list[tuple[NormFacts, NormFacts]]:
    """Norms of the model and of the average by their order, as the wrappers of averages change paths."""
    ours = [norm for norm in facts.batch_norms if norm.populations]
    theirs = [norm for norm in facts.averaged or () if norm.is_batch_norm and norm.populations]
    return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []


def _are_finite(*populations: Population) -> bool:
    return all(bool(torch.isfinite(p.mean).all() and torch.isfinite(p.var).all()) for p in populations)


def _is_initial(population: Population) -> bool:
    return not bool(population.mean.count_nonzero()) and bool((population.var == 1).all())


def _measure(ours: Population, theirs: Population) -> tuple[float, float]:
    """Distance of the means in the model's standard deviations, and |log| of the ratio of variances: over channels."""
    least = 1e-5 * ours.var.abs().max().clamp(min=1e-12)  # dead channels have neither
    var, other = ours.var.clamp(min=least), theirs.var.clamp(min=least)
    distance = (ours.mean - theirs.mean).abs() / var.sqrt()
    return float(distance.mean()), float((other / var).log().abs().mean())


def _are_near(norm: NormFacts, average: NormFacts) -> bool:
    """Whether scale and shift are about the same, in units of the scale; without any, nothing speaks against it."""
    for ours, theirs in zip(norm.affines, average.affines, strict=False):
        size = 1.0 if ours.weight is None else float(ours.weight.square().mean().sqrt())
        for one, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            if one is None or other is None or one.shape != other.shape:
                continue
            if float((one - other).square().mean().sqrt()) > _NEAR * size:
                return False
    return True


def _count(distances: dict[str, float]) -> dict[str, float]:
    return {"norms": len(distances), "distance": max(distances.values())}


def _advise(facts: Facts) -> Remedy:
    text = "Re-estimate the statistics for the averaged weights, or average buffers with the parameters."
    call = "bnext.recompute_population_statistics(averaged, data)"
    keys: dict[str, object] = {}
    if facts.origin.kind == "config":
        keys = {"SOLVER.BNEXT.EMA.ENABLED": True, "SOLVER.BNEXT.EMA.BUFFERS": "re_estimated"}
    return Remedy(text, keys=keys, call=call)


CHECK = Check(
    code="BN026",
    name="average-lags",
    title="averaged weights have running statistics that are not theirs",
    explanation=(
        "An exponential moving average, a teacher or SWA averages parameters; running statistics are buffers, and stay "
        "those of the copy that it began with unless somebody copies, averages or re-estimates them. The averaged "
        "model is then worse than the model, for no visible reason."
    ),
    cost="",
    source="U2PL#64, cosmix-uda#21, timm#245",
    depth="static",
    examine=_examine,
)

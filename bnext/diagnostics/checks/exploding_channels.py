"""BN033: channels whose variance, scale or output is out of all proportion to their layer's, or to the model's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnext.diagnostics.facts import Facts, NormFacts, Population
from bnext.diagnostics.findings import Check, Evidence, Remedy
from bnext.diagnostics.measures.initial_state import drop_initial, get_affine, is_young
from bnext.diagnostics.measures.merged_calls import merge_calls
from bnext.diagnostics.re_estimation import advise_reestimation
from bnext.functional import Moments

__all__ = ["CHECK"]

# Variances within a layer of an ImageNet network are a factor of 1e4 apart, those of the layers of one network 1e3.
_VARIANCES = 1e6
# Scales of trained norms are at most 10 and within a factor of 100 of their layer's median.
_SCALES, _LEAST_SCALE = 1e3, 100.0
# Standard deviations of a normalized feature from the running mean: 10 under a strong shift of the domain.
_DEVIATIONS = 1e3
_FEW = 4  # channels of which there is no median


def _examine(facts: Facts) -> Iterator[Evidence]:
    wide = _find_wide_variances(facts)
    if wide:
        text = (
            f"The running variance of {len(wide)} of {len(facts.batch_norms)} norms is up to {max(wide.values()):.2g} "
            "times the median of their channels, or of the norms of the model."
        )
        remedy = advise_reestimation(
            facts,
            wide,
            "If the weights before are right, the statistics are damaged. Else the training diverges there.",
        )
        yield Evidence("warning", tuple(wide), text, remedy, {"norms": float(len(wide)), "ratio": max(wide.values())})

    scales = {norm.path: scale for norm in facts.batch_norms if (scale := _find_huge_scale(norm)) > 0}
    if scales:
        text = (
            f"The scale of {len(scales)} of {len(facts.batch_norms)} norms is up to {max(scales.values()):.3g}, "
            "where trained ones are below 10: it outweighs all other features."
        )
        remedy = Remedy(
            "Use an earlier checkpoint, and go on from it with a lower learning rate, a warm-up or clipped gradients."
        )
        yield Evidence("warning", tuple(scales), text, remedy, {"norms": float(len(scales))})

    outputs = _find_huge_outputs(facts)
    if outputs:
        text = (
            f"{len(outputs)} of {len(facts.batch_norms)} norms get features that are up to "
            f"{max(outputs.values()):.2g} standard deviations from their running mean (the first: "
            f"{next(iter(outputs))}): at inference the outputs explode."
        )
        remedy = advise_reestimation(facts, outputs, "The statistics are not those of these images.")
        numbers = {"norms": float(len(outputs)), "deviations": max(outputs.values())}
        yield Evidence("warning", tuple(outputs), text, remedy, numbers)


def _find_wide_variances(facts: Facts) -> dict[str, float]:
    """Path -> ratio, of norms that follow another one: the first may get raw inputs in units of their own."""
    medians: dict[str, float] = {}
    within: dict[str, float] = {}
    for norm in facts.batch_norms:
        for population in norm.populations:
            alive = population.var[torch.isfinite(population.var) & (population.var > norm.record.eps)]
            if not len(alive):
                continue
            median = float(alive.median())
            medians[norm.path] = max(median, medians.get(norm.path, 0.0))
            if len(alive) >= _FEW:
                within[norm.path] = max(float(alive.max()) / median, within.get(norm.path, 0.0))

    typical = float(torch.tensor(list(medians.values()), dtype=torch.float64).median()) if medians else 1.0
    first = facts.batch_norms[0].path if facts.batch_norms else ""
    ratios = {}
    for path, median in medians.items():
        ratio = max(within.get(path, 0.0), median / typical if len(medians) >= _FEW else 0.0)
        if ratio >= _VARIANCES and path != first:
            ratios[path] = ratio
    return ratios


def _find_huge_scale(norm: NormFacts) -> float:
    """The largest scale, where it is out of proportion; else 0."""
    for affine in norm.affines:
        if affine.weight is None or len(affine.weight) < _FEW or not bool(torch.isfinite(affine.weight).all()):
            continue
        sizes = affine.weight.abs()
        largest, median = float(sizes.max()), float(sizes.median())
        is_alone = largest >= _LEAST_SCALE and largest >= _SCALES * median
        if is_alone or median >= _SCALES:
            return largest
    return 0.0


def _find_huge_outputs(facts: Facts) -> dict[str, float]:
    """Path -> standard deviations, if every norm has statistics: else features grow with depth, and rightly so.

    They do, too, while statistics are on their way; each norm is then seen behind others that mini-batches normalize.
    """
    populations = [(norm, one) for norm in facts.batch_norms for one in norm.populations]
    if any(_is_unwritten(one.mean, one.var) for _, one in populations):
        return {}

    is_beginning = any(is_young(norm, one) for norm, one in populations)
    merged = merge_calls(facts, "mini_batch" if is_beginning else "population")
    huge = {}
    for norm in facts.batch_norms:
        if norm.path in merged and len(norm.populations) == 1:
            ways = [_measure_deviation(norm, merged[norm.path], one) for one in _list_ways(norm)]
            if min(ways) > 0:
                huge[norm.path] = min(ways)
    return huge


def _list_ways(norm: NormFacts) -> tuple[Population, Population]:
    """The population as it is, and without the values that it began with."""
    return norm.populations[0], drop_initial(norm, norm.populations[0])


def _measure_deviation(norm: NormFacts, moments: Moments, population: Population) -> float:
    """The largest distance of features from the running mean in standard deviations, where it is huge; else 0."""
    if len(population.var) != moments.mean.shape[-1] or not bool((population.var >= 0).all()):
        return 0.0
    power = moments.var + (moments.mean - population.mean).square()
    deviations = (power / (population.var + norm.record.eps)).sqrt()
    affine = get_affine(norm, population.owner)
    size = deviations if affine is None or affine.weight is None else deviations * affine.weight.abs()
    seen = deviations[(size >= _DEVIATIONS) & (deviations >= _DEVIATIONS) & torch.isfinite(size)]
    return float(seen.max()) if len(seen) else 0.0


def _is_unwritten(mean: Tensor, var: Tensor) -> bool:
    return not bool(mean.any()) and bool(((var - 1).abs() < 1e-4).all())


CHECK = Check(
    code="BN033",
    name="exploding-channels",
    title="channels out of all proportion",
    explanation=(
        "One channel whose variance, scale or output is a million times that of the others decides what all layers "
        "after it see; in half precision it becomes infinite. It comes from a training that diverged, from statistics "
        "of other images, or from a damaged file. The spread that trained networks have, a factor of 10,000 between "
        "variances and of 100 between scales, is none, nor are raw inputs in units of their own before the first norm."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

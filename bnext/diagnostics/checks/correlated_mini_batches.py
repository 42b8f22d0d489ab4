"""BN003: mini-batches of samples that are alike, as the RoIs of one image, which no population is like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bnext.diagnostics.batch_remedies import name_architecture, write_conversion
from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.batch_sizes import count_images_together, count_samples, divide_calls, has_many_samples

__all__ = ["CHECK"]

# Variance between the means of mini-batches over what independent samples would give, the F of an analysis of
# variance. It is 1 for independent ones, whatever the scale; 3.84 is its 95th percentile with two mini-batches, and
# from there on a sample is worth less than a quarter of an independent one.
_CORRELATED = 3.84
_POINTS = {1: 11.0, 2: 1.6}  # box AP that images together lose against 41.7: Wu and Johnson 2021, Table 3
_FEW = 4  # images together from which on nothing is said; of 3 and 4 nothing was published


def _examine(facts: Facts) -> Iterator[Evidence]:
    by_kind: dict[tuple[int, Severity], dict[NormFacts, float | None]] = {}
    for norm in facts.batch_norms:
        if norm.record.inference != "population" or not has_many_samples(facts, norm):
            continue
        images = count_images_together(facts, norm)
        ratio = _measure(facts, norm)
        severity = _judge(norm, images, ratio)
        if images is not None and severity is not None:
            by_kind.setdefault((images, severity), {})[norm] = ratio

    for (images, severity), norms in by_kind.items():
        yield _tell(facts, images, severity, norms)


def _judge(norm: NormFacts, images: int | None, ratio: float | None) -> Severity | None:
    """The finding on norms of one kind; None: there is none."""
    is_seen = ratio is not None and ratio >= _CORRELATED
    is_shared = norm.record.workers not in ("one", 1) or bool(norm.shuffle)
    if images is None or images > _FEW or (images > 1 and is_shared):
        return None  # all images of a step are together
    if norm.sees_rois is None and not is_seen:
        return None

    if ratio is not None and not is_seen:
        return "note"
    severities: tuple[Severity, ...] = ("error", "warning", "note", "note")
    # Of whole mini-batches of RoIs it was measured; other samples of an image, or fewer, may be less harmful.
    is_measured = norm.sees_rois is True and norm.record.group_size is None
    return severities[images - 1] if is_measured else severities[min(images, 2)]


def _tell(facts: Facts, images: int, severity: Severity, norms: dict[NormFacts, float | None]) -> Evidence:
    samples = "RoIs" if all(norm.sees_rois for norm in norms) else "samples"
    of_images = "a single image" if images == 1 else f"{images} images"
    text = f"{len(norms)} batch norms are trained on mini-batches of the {samples} of {of_images}"
    numbers = {"norms": float(len(norms)), "images": float(images)}

    ratios = [ratio for ratio in norms.values() if ratio is not None]
    if ratios:
        numbers["variance_ratio"] = max(ratios)
        text += (
            f", whose means differ from image to image {max(ratios):.3g} times as much (in variance) as those of "
            "independent samples would"
        )
    text += ". Their statistics tell of the image, which the network learns to use; the population's do not."
    paths = tuple(norm.path for norm in norms)
    return Evidence(severity, paths, text, _advise(facts, list(norms)), numbers, _POINTS.get(images, 0.0))


# ---- how alike samples are


def _measure(facts: Facts, norm: NormFacts) -> float | None:
    """The largest variance ratio of the mini-batches of a norm, over channels the median; None: not known."""
    by_kind: dict[str, list[list[Tensor]]] = {"population": [], "mini_batch": []}
    for forward in facts.forwards:
        if forward.is_noise:
            continue
        groups = divide_calls(norm, forward)
        by_kind[forward.normalized_by].append([torch.cat([call.samples.mean for call in calls]) for calls in groups])

    # By mini-batch statistics the norms before have taken away part of what an image's samples share.
    forwards = by_kind["population"] if len(by_kind["population"]) > 1 else by_kind["mini_batch"]
    ratios = []
    for mini_batches in zip(*forwards, strict=False):
        ratio = _compare(mini_batches)
        if ratio is not None:
            ratios.append(ratio)
    return max(ratios, default=None)


def _compare(mini_batches: Sequence[Tensor]) -> float | None:
    """The F of samples' means [N, C] between and within mini-batches, median over channels."""
    mini_batches = [means for means in mini_batches if len(means) > 1]
    number = sum(map(len, mini_batches))
    if len(mini_batches) < 2:
        return None

    center = torch.cat(list(mini_batches)).mean(0)
    between = torch.stack([len(means) * (means.mean(0) - center).square() for means in mini_batches]).sum(0)
    within = torch.stack([(means - means.mean(0)).square().sum(0) for means in mini_batches]).sum(0)

    ratios = (between / (len(mini_batches) - 1)) / (within / (number - len(mini_batches)))
    ratios = ratios[ratios.isfinite()]
    is_same = not len(ratios) or float(ratios.max()) < 1e-9  # one batch again and again
    return None if is_same else float(ratios.median())


# ---- remedies


def _advise(facts: Facts, norms: Sequence[NormFacts]) -> Remedy:
    training = facts.training
    num_workers = (training.num_workers if training is not None else None) or 1
    can_share = num_workers > 1 and all(norm.record.workers in ("one", 1) and not norm.shuffle for norm in norms)

    if facts.origin.kind == "config":
        return _choose_keys(facts, norms, can_share)
    is_cut = all(norm.record.group_size is not None for norm in norms)
    if can_share:
        text = (
            "Let the workers share their mini-batches; or deal the samples out at random: bnext.deal_statistics(head), "
            "or bnext.Shuffled(head) for norms of others."
        )
        return Remedy(text, call=write_conversion(facts, norms, 'bnext.NormSpec(workers="all")'))
    if is_cut and training is not None and (training.images_per_worker or 1) > 1:
        text = "Normalize all samples of a worker together, not in groups of consecutive ones."
        return Remedy(text, call=write_conversion(facts, norms, "bnext.NormSpec()"))
    text = "Normalize by the mini-batch of each image at inference, too, one image at a time; or mix more images."
    return Remedy(text, call=write_conversion(facts, norms, 'bnext.NormSpec(inference="mini_batch")'))


def _choose_keys(facts: Facts, norms: Sequence[NormFacts], can_share: bool) -> Remedy:
    places = {norm.place: norm.norm_key for norm in norms if norm.norm_key}
    has_node = all(facts.get_config(f"MODEL.BNEXT.{place}.SHUFFLE") is not None for place in places)
    inference = dict.fromkeys((f"MODEL.BNEXT.{place}.INFERENCE" for place in places), "mini_batch")
    architecture = name_architecture(facts)

    cut = {norm.place: _count_deals(facts, norm) for norm in norms if norm.record.group_size is not None}
    if cut and all(cut.values()):
        return _deal_instead(facts, cut)

    command = ""
    if facts.weights is not None and facts.weights.is_loaded and places:
        words = [str(word) for pair in {**architecture, **inference}.items() for word in pair]
        command = facts.origin.write_command("evaluate", pairs=tuple(words))
    if not can_share:
        text = (
            "Normalize by the RoIs of each image at inference, too (41.5 instead of 30.7 AP with one image), which "
            "repairs a trained checkpoint; or take GN (41.4 AP)."
        )
        return Remedy(text, keys={**architecture, **inference}, command=command)

    after = " A checkpoint that is trained already is repaired by mini-batches at inference." if command else ""
    if architecture or not has_node:
        keys: dict[str, object] = dict.fromkeys(places.values(), "SyncBN")
        text = f"Let all workers share their mini-batches (41.7 AP; no worse than shuffled RoIs).{after}"
        return Remedy(text, keys=keys, command=command)

    keys = {}
    for place in places:
        node = f"MODEL.BNEXT.{place}"
        keys[f"{node}.SHUFFLE"] = "statistics"
        if facts.get_config(f"{node}.WORKERS") is not None:
            keys[f"{node}.WORKERS"] = "all"
    text = f"Deal the RoIs of all workers out at random (41.7 AP, as with SyncBN).{after}"
    return Remedy(text, keys=keys, command=command)


def _count_deals(facts: Facts, norm: NormFacts) -> int | None:
    """Groups of the size of a Ghost BN among the samples of all workers; None: not known, or nothing is to be mixed."""
    training, size, samples = facts.training, norm.record.group_size, count_samples(facts, norm)
    if training is None or size is None or samples is None or (training.images_per_worker or 1) < 2:
        return None
    number = samples * (training.num_workers or 1) // size
    return number if number > 1 else None


def _deal_instead(facts: Facts, groups: Mapping[str, int | None]) -> Remedy:
    keys: dict[str, object] = {}
    for place, number in groups.items():
        node = f"MODEL.BNEXT.{place}"
        keys |= {
            f"{node}.NORMALIZATION_BATCH_SIZE": 0,
            f"{node}.SHUFFLE": "statistics",
            f"{node}.SHUFFLE_GROUPS": number,
        }
        if facts.get_config(f"{node}.WORKERS") is not None:
            keys[f"{node}.WORKERS"] = "all"
    return Remedy("Deal the RoIs of all images out at random to groups of that size.", keys=keys)


CHECK = Check(
    code="BN003",
    name="correlated-mini-batches",
    title="mini-batches are of samples that are alike, as the RoIs of one image",
    explanation=(
        "A mini-batch of the RoIs of one image has statistics that tell of the image. The head learns to use them, and "
        "at inference, with population statistics, they are gone. The remedy is to mix images: SyncBN, RoIs dealt out "
        "at random over the workers; or to give the head at inference what it had in training, the mini-batch of the "
        "image. A Ghost BN takes RoIs in their order, so that its groups are of one image as well. Samples of an image "
        "that differ as much as those of several lose nothing."
    ),
    cost="30.7 box AP with one image per worker, 40.1 with two, instead of 41.7 (Mask R-CNN R50-FPN on COCO, 3x)",
    source="Wu and Johnson 2021, Tables 3 and 6",
    depth="static",
    examine=_examine,
    points=11.0,
)

"""BN034: norms by which a prediction depends on what else is in its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnext.diagnostics.batch_remedies import write_conversion
from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy
from bnext.diagnostics.measures.batch_sizes import has_many_samples

__all__ = ["CHECK"]


def _examine(facts: Facts) -> Iterator[Evidence]:
    by_mini_batch = [
        norm
        for norm in facts.batch_norms
        if norm.record.inference == "mini_batch" and norm.is_by_mini_batch and not has_many_samples(facts, norm)
    ]
    if by_mini_batch:
        yield _tell(facts, by_mini_batch)

    # In a model in evaluation mode they normalize by mini-batches, and move their statistics besides.
    live = [norm for norm in facts.batch_norms if norm.is_training and not facts.is_training and norm.is_by_mini_batch]
    live = [norm for norm in live if norm not in by_mini_batch and not has_many_samples(facts, norm)]
    if live:
        text = (
            f"{len(live)} batch norms are in training mode within a model in evaluation mode: mini-batches normalize, "
            "so that a prediction depends on the others of its batch, and every forward moves the running statistics."
        )
        remedy = Remedy("Put the whole model into evaluation mode.", call="model.eval()")
        yield Evidence("warning", tuple(norm.path for norm in live), text, remedy, {"norms": float(len(live))})


def _tell(facts: Facts, norms: Sequence[NormFacts]) -> Evidence:
    without = sum(norm.record.population == "none" for norm in norms)
    kept = "keep no population statistics" if without else "do not use their population statistics"
    text = (
        f"{len(norms)} batch norms {kept}: at inference the mini-batch normalizes, so that a prediction depends on the "
        "others of its batch."
    )
    paths = tuple(norm.path for norm in norms)
    numbers = {"norms": float(len(norms)), "without_population": float(without)}
    return Evidence("warning", paths, text, _advise(facts, norms), numbers)


def _advise(facts: Facts, norms: Sequence[NormFacts]) -> Remedy:
    text = "Normalize by population statistics; those of a trained model are estimated in one pass over its data."
    if facts.origin.kind != "config":
        conversion = write_conversion(facts, norms, "bnext.NormSpec()")
        recompute = "bnext.recompute_population_statistics(model, data)"
        return Remedy(text, call=f"{conversion}\n{recompute}" if conversion else "")

    keys: dict[str, object] = {}
    for norm in norms:
        for answer, wanted in {"INFERENCE": "population", "POPULATION": "shared"}.items():
            key = f"MODEL.BNEXT.{norm.place}.{answer}"
            if facts.get_config(key, wanted) in ("mini_batch", "none"):
                keys[key] = wanted

    command = ""
    if facts.weights is not None and facts.weights.is_loaded and keys:
        pairs = tuple(str(word) for pair in keys.items() for word in pair)
        command = facts.origin.write_command("reestimate", "--output", "repaired.pth", pairs=pairs)
    return Remedy(text, keys=keys, command=command)


CHECK = Check(
    code="BN034",
    name="mini-batch-at-inference",
    title="mini-batches normalize at inference",
    explanation=(
        "A prediction that depends on which other images are in the batch cannot be reproduced, and at batch size 1 it "
        "is another model than that of the training. It is right where one input brings a batch of its own, as an "
        "image its RoIs, and a makeshift for normalization batches of up to 4, where the population is worse still."
    ),
    cost="24.7 instead of 23.6 % error (ResNet-50 on ImageNet, normalization batch size 256)",
    source="Wu and Johnson 2021, section 4",
    depth="static",
    examine=_examine,
    points=1.1,
)

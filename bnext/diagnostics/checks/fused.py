"""BN020: statistics that are folded into an affine or a convolution, in a model that is to be trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.initial_state import find_unwritten, get_affine, has_moved, is_of_frozen

__all__ = ["CHECK"]

_LOAD_OTHER = "Load the checkpoint from before it was folded."


def _examine(facts: Facts) -> Iterator[Evidence]:
    weights = facts.weights
    live = [norm for norm in facts.batch_norms if norm.is_by_mini_batch and norm.record.population != "none"]

    if facts.is_training and facts.folded:
        yield _judge_convolutions(facts)
    if weights is not None and weights.is_folded and not weights.folded:
        yield _judge_file(facts, weights.missing)
    if weights is not None and weights.is_folded:
        live = [norm for norm in live if norm.path in weights.folded]
    else:
        live = [norm for norm in live if _is_of_frozen(norm)]
    if live and facts.is_training:
        yield _judge_affine(facts, live)


def _is_of_frozen(norm: NormFacts) -> bool:
    """Whether its state is that of detectron2's frozen norm without statistics: mean 0, variance 1 - eps."""
    folded = [population for population in find_unwritten(norm) if is_of_frozen(population)]
    return any(has_moved(get_affine(norm, population.owner)) for population in folded)


def _judge_convolutions(facts: Facts) -> Evidence:
    text = (
        f"{len(facts.folded)} norms are folded into the layers before them, or were taken out, and the model is in "
        "training mode: it trains without them."
    )
    remedy = Remedy(
        "Train the model that was not folded, and fold it afterwards.",
        call="model.eval()  # for inference; for a training build the model anew and load the file from before",
    )
    return Evidence("error", facts.folded, text, remedy, {"norms": float(len(facts.folded))})


def _judge_file(facts: Facts, missing: tuple[str, ...]) -> Evidence:
    number = len(missing) or len(facts.batch_norms)
    text = (
        f"The file is of a model whose norms were folded into its convolutions: it has nothing for {number} norms of "
        "this model, and biases or marks of the folding in their place."
    )
    return Evidence("error", missing, text, Remedy(_LOAD_OTHER), {"norms": float(number)})


def _judge_affine(facts: Facts, live: Sequence[NormFacts]) -> Evidence:
    is_read = facts.weights is None or facts.weights.is_loaded
    text = f"{len(live)} norms that are to be trained by mini-batches have their statistics in their scale and shift"
    text += (
        " (mean 0, variance 1, and an affine that does all)." if is_read else ", as these weights are known to have."
    )
    text += " A mini-batch would normalize their features a second time."

    remedy = Remedy(f"Freeze them, or {_LOAD_OTHER[0].lower()}{_LOAD_OTHER[1:]}", call=_write_call(live))
    if facts.origin.kind == "config":
        keys = {norm.norm_key: "FrozenBN" for norm in live if norm.norm_key}
        text_of_keys = "Freeze them; or train from weights with statistics, as torchvision's (`bnext convert`)."
        remedy = Remedy(text_of_keys, keys=keys)

    severity: Severity = "warning" if is_read else "note"  # published recipes train from such weights and get there
    return Evidence(severity, tuple(norm.path for norm in live), text, remedy, {"norms": float(len(live))})


def _write_call(live: Sequence[NormFacts]) -> str:
    return f"bnext.freeze_norms(model, select=lambda path, norm: path in {tuple(norm.path for norm in live)})"


CHECK = Check(
    code="BN020",
    name="fused",
    title="weights whose statistics are folded in are about to be trained",
    explanation=(
        "`weight / sqrt(var + eps)` in the place of `weight`, or in the convolution, computes the same at inference. "
        "In a training it is another network: gradients are scaled by statistics, and a norm by mini-batches gets an "
        "affine that was meant for features that are not normalized. Frozen norms may have it, as in detectron2's MSRA "
        "models."
    ),
    cost="",
    source="Wu and Johnson 2021, appendix A.8",
    depth="static",
    examine=_examine,
)

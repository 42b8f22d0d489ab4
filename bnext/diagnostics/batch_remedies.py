"""Remedies of small or unfit mini-batches that several checks give: as config keys of a place, or as a call."""

from __future__ import annotations

from collections.abc import Sequence

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Remedy
from bnext.diagnostics.measures.batch_sizes import count_workers

__all__ = ["NO_MORE", "choose_larger_batch", "name_architecture", "write_conversion"]

NO_MORE = 8  # samples up to which frozen statistics win over those of the mini-batch (Wu and Johnson 2021, section 4)
_ARCHITECTURES = {
    "GeneralizedRCNN": "BNextGeneralizedRCNN",
    "PanopticFPN": "BNextPanopticFPN",
    "ProposalNetwork": "BNextProposalNetwork",
    "RetinaNet": "BNextRetinaNet",
    "FCOS": "BNextFCOS",
    "SemanticSegmentor": "BNextSemanticSegmentor",
}


def choose_larger_batch(facts: Facts, norms: Sequence[NormFacts]) -> Remedy:
    """Norms that a small batch does not harm, or more samples for those that there are.

    Args:
        facts: with a training, whose images and workers are known.
        norms: that normalize too few samples together.
    """
    training = facts.training
    images = (training.images_per_worker if training else None) or 1
    total = images * ((training.num_workers if training else None) or 1)
    can_share = total > NO_MORE and any((count_workers(facts, norm) or 1) * images < total for norm in norms)
    is_cut = images > NO_MORE and any(norm.record.group_size is not None for norm in norms)

    if facts.origin.kind == "config":
        return _choose_keys(facts, norms, total, can_share, is_cut)
    if can_share:
        text = f"Let all workers share their mini-batches, which are then of {total} samples."
        return Remedy(text, call=write_conversion(facts, norms, 'bnext.NormSpec(workers="all")'))
    if is_cut:
        text = f"Normalize all {images} samples of a worker together, not in groups."
        return Remedy(text, call=write_conversion(facts, norms, "bnext.NormSpec()"))
    if facts.is_trained:
        text = "Freeze their statistics, which are those of a training with a larger batch; or feed more samples."
        paths = [norm.path for norm in norms]
        call = f"bnext.freeze_norms(model, select=lambda path, layer: path in {paths!r})"
        return Remedy(text, call="bnext.freeze_norms(model)" if _are_all(facts, norms) else call)
    text = "Take GroupNorm, which needs no batch; or feed more samples."
    return Remedy(text, call=write_conversion(facts, norms, '"GN"'))


def _choose_keys(facts: Facts, norms: Sequence[NormFacts], total: int, can_share: bool, is_cut: bool) -> Remedy:
    keys: dict[str, object] = {}
    has_weights = facts.weights is not None and bool(facts.weights.source)
    for place in dict.fromkeys((norm.place, norm.norm_key) for norm in norms if norm.norm_key):
        name, norm_key = place
        if can_share or is_cut:
            answers = {"WORKERS": "all" if can_share else "one", "NORMALIZATION_BATCH_SIZE": 0}
            node = {f"MODEL.BNEXT.{name}.{key}": value for key, value in answers.items()}
            keys |= {key: value for key, value in node.items() if facts.get_config(key, None) not in (None, value)}
        if can_share:
            keys[norm_key] = "SyncBN"
        elif not is_cut:
            keys[norm_key] = "FrozenBN" if has_weights and name == "RESNETS" else "GN"

    if can_share:
        return Remedy(f"Let all workers share their mini-batches, which are then of {total} images.", keys=keys)
    if is_cut:
        return Remedy("Normalize all images of a worker together, not in groups.", keys=keys)
    text = "Take a norm that needs no batch: frozen statistics where there are weights of a training, else GroupNorm."
    return Remedy(f"{text} More images per worker, if they fit, do as well.", keys=keys)


def name_architecture(facts: Facts) -> dict[str, object]:
    """The key that makes a detector of detectron2 heed MODEL.BNEXT; {} where it does already, or none would."""
    key = "MODEL.META_ARCHITECTURE"
    name = _ARCHITECTURES.get(str(facts.get_config(key)))
    return {key: name} if name else {}


def write_conversion(facts: Facts, norms: Sequence[NormFacts], new: str) -> str:
    """A call that gives norms another form; "" where some get no [N, C, H, W], which it refuses.

    Args:
        facts: of the whole model.
        norms: to be converted.
        new: Python of what `convert_norm` makes of them.
    """
    paths = [norm.path for norm in norms]
    for forward in facts.forwards:
        if any(len(call.size) != 4 for path in paths for call in forward.calls.get(path, ())):
            return ""
    if _are_all(facts, norms):
        return f'bnext.convert_norm(model, {{"": {new}}})'
    return f"bnext.convert_norm(model, dict.fromkeys({paths!r}, {new}))"


def _are_all(facts: Facts, norms: Sequence[NormFacts]) -> bool:
    return len(norms) == len(facts.norms)

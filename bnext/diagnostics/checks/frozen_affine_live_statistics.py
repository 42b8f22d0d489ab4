"""BN004: parameters that were frozen, and statistics that go on moving in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity

__all__ = ["CHECK"]

_FREEZABLE = ("torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.batchnorm.SyncBatchNorm", "bnext.")
_FREEZE = "bnext.freeze_norms(model, select=lambda path, norm: {selected})"
_STOP = "for path in {paths}:  # after every model.train()\n    model.get_submodule(path).eval()"


def _examine(facts: Facts) -> Iterator[Evidence]:
    by_layer: dict[bool, list[NormFacts]] = {}
    for norm in facts.batch_norms:
        if not norm.is_training or not norm.is_by_mini_batch or norm.record.population == "none":
            continue
        if any(affine.is_trained for affine in norm.affines):
            continue
        is_after_frozen = norm.is_after_trained is False
        if norm.affines or is_after_frozen:
            by_layer.setdefault(is_after_frozen, []).append(norm)

    for is_after_frozen, norms in by_layer.items():
        yield _judge(facts, norms, is_after_frozen)


def _judge(facts: Facts, norms: Sequence[NormFacts], is_after_frozen: bool) -> Evidence:
    number = len(norms)
    text = f"{number} of {len(facts.batch_norms)} batch norms have no parameter that is trained"
    text += ", nor has the layer before them" if is_after_frozen else ""
    text += "; in training mini-batches normalize them all the same, and move their running statistics."

    severity: Severity = "warning" if is_after_frozen else "note"
    if facts.num_trained == 0:
        severity = "note"
        text += " Nothing of the model is trained: it may be the teacher of another one."
    return Evidence(severity, tuple(norm.path for norm in norms), text, _advise(facts, norms), {"norms": float(number)})


def _advise(facts: Facts, norms: Sequence[NormFacts]) -> Remedy:
    paths = tuple(norm.path for norm in norms)
    selected = f"path in {paths}"
    if all(norm.affines for norm in norms):
        selected = "{parameter.requires_grad for parameter in norm.parameters()} == {False}"
    call = _FREEZE.format(selected=selected)
    if not all(norm.type_name.startswith(_FREEZABLE) for norm in norms):
        call = _STOP.format(paths=paths)

    places = sorted({norm.place for norm in norms} - {""})
    keys = {f"MODEL.BNEXT.{place}.FROZEN": "both" for place in places} if facts.origin.kind == "config" else {}
    return Remedy("Freeze the statistics, too: requires_grad=False does not.", keys=keys, call=call)


CHECK = Check(
    code="BN004",
    name="frozen-affine-live-statistics",
    title="frozen parameters, and statistics that go on moving",
    explanation=(
        "`requires_grad=False` freezes scale and shift alone. As long as the norm is in training mode, each mini-batch "
        "normalizes by itself and moves the running statistics, so that a frozen part of a model gives other features "
        "after every step. A norm behind a layer that is trained may follow it with a fixed affine, on purpose."
    ),
    cost="",
    source="pytorch#86590, lightly#1438",
    depth="static",
    examine=_examine,
)

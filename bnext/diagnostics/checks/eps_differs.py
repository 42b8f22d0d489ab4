"""BN018: an eps that is not the one with which the weights were trained, or that a half precision cannot hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.errors import list_few

__all__ = ["CHECK"]

_VISIBLE = 0.01  # relative change of a channel's scale; rounding, also to half precision, stays below it
_USUAL = 1e-5  # of torch, detectron2 and Caffe2, with which most weights were trained
_NONE = 1e-9  # what adds next to nothing to a variance in float32
_LEAST_HALF = 0.99e-5  # smaller ones are rounded to few digits in float16, or to 0


def _examine(facts: Facts) -> Iterator[Evidence]:
    norms = [norm for norm in facts.batch_norms if norm.record.inference == "population"]

    if facts.weights is not None:
        yield from _compare(facts, norms, facts.weights.eps, "the file says")
    if facts.before is not None:
        eps = {norm.path: norm.record.eps for norm in facts.before if norm.is_batch_norm}
        yield from _compare(facts, norms, eps, "they had before")
    if not facts.before and (facts.weights is None or not facts.weights.eps):
        yield from _compare_frozen(facts, norms)
        yield from _find_none(facts, norms)
    yield from _find_half(facts, norms)


def _compare(facts: Facts, norms: Sequence[NormFacts], expected: Mapping[str, float], where: str) -> Iterator[Evidence]:
    wanted = {}
    for norm in norms:
        eps = expected.get(norm.path, norm.record.eps)
        if eps != norm.record.eps:
            wanted[norm.path] = eps
    if not wanted:
        return

    words = "{number} norms have eps {eps} where " + where
    yield _judge(facts, norms, wanted, words + " {wanted}: the scale of a channel changes by up to {change:.2g} of it.")


def _compare_frozen(facts: Facts, norms: Sequence[NormFacts]) -> Iterator[Evidence]:
    """Frozen and live norms of one part of a model, such as a backbone, come from one training, with one eps."""
    parts: dict[str, list[NormFacts]] = {}
    for norm in norms:
        parts.setdefault(norm.place or norm.path.partition(".")[0], []).append(norm)

    wanted = {}
    for part in parts.values():
        live = {norm.record.eps for norm in part if norm.record.frozen in ("none", "affine")}
        for norm in part:
            is_frozen = norm.record.frozen in ("statistics", "both")
            if is_frozen and len(live) == 1 and norm.record.eps > _NONE and norm.record.eps not in live:
                wanted[norm.path] = min(live)
    if not wanted:
        return

    words = "{number} frozen norms have eps {eps}, and those of the same part that are not frozen {wanted}"
    yield _judge(facts, norms, wanted, words + ": a difference of up to {change:.2g} of a channel's scale.")


def _judge(facts: Facts, norms: Sequence[NormFacts], wanted: Mapping[str, float], words: str) -> Evidence:
    """Norms whose eps is another than it should be; words with number, eps, wanted and change in braces."""
    others = [norm for norm in norms if norm.path in wanted]
    change = max(_measure(norm, wanted[norm.path]) for norm in others)
    eps = _list(norm.record.eps for norm in others)
    text = words.format(number=len(wanted), eps=eps, wanted=_list(wanted.values()), change=change)
    severity: Severity = "warning" if change >= _VISIBLE else "note"
    return Evidence(severity, tuple(wanted), text, _advise(facts, others, wanted), {"change": change})


def _find_none(facts: Facts, norms: Sequence[NormFacts]) -> Iterator[Evidence]:
    """Norms that add nothing to the variance."""
    changes = {norm.path: _measure(norm, _USUAL) for norm in norms if norm.record.eps <= _NONE}
    live = [norm.path for norm in norms if norm.path in changes and norm.is_by_mini_batch]
    wrong = {path: change for path, change in changes.items() if path in live or change >= _VISIBLE}
    if not wrong:
        return

    text = f"{len(wrong)} norms have eps 0"
    text += f", {len(live)} of them by mini-batches: a channel without variance gives NaN." if live else ":"
    change = max(wrong.values())
    text += f" With {_USUAL:g}, as most weights were trained, a channel's scale is up to {change:.2g} of it smaller."
    remedy = _advise(facts, [norm for norm in norms if norm.path in wrong], dict.fromkeys(wrong, _USUAL))
    yield Evidence("warning", tuple(wrong), text, remedy, {"change": change})


def _find_half(facts: Facts, norms: Sequence[NormFacts]) -> Iterator[Evidence]:
    small = [norm for norm in norms if norm.dtype == "float16" and norm.record.eps < _LEAST_HALF]
    if not small:
        return

    text = f"{len(small)} norms in float16 have eps {_list(norm.record.eps for norm in small)}"
    text += f": below {_USUAL:g} there are few digits left, and below 6e-8 it is 0."
    remedy = Remedy(
        "Keep norms in float32, as autocast does; a larger eps than that of the training changes outputs.",
        call=f"for path in {tuple(norm.path for norm in small)}:\n    model.get_submodule(path).float()",
    )
    yield Evidence("warning", tuple(norm.path for norm in small), text, remedy, {"norms": float(len(small))})


def _measure(norm: NormFacts, eps: float) -> float:
    """Largest relative change of a channel's scale by another eps; 0 where there are no statistics.

    |sqrt((var + eps of the norm) / (var + eps)) - 1|
    """
    changes = [0.0]
    for population in norm.populations:
        var = population.var[torch.isfinite(population.var) & (population.var >= 0)]
        if len(var):
            ratio = (var + norm.record.eps) / (var + eps).clamp(min=1e-30)
            changes.append(float((ratio.sqrt() - 1).abs().max()))
    return max(changes)


def _list(values: object) -> str:
    numbers = sorted(set(values))  # type: ignore[call-overload]
    return list_few([f"{number:g}" for number in numbers])


def _advise(facts: Facts, norms: Sequence[NormFacts], wanted: Mapping[str, float]) -> Remedy:
    values = set(wanted.values())
    places = sorted({norm.place for norm in norms})
    keys: dict[str, object] = {}
    if facts.origin.kind == "config" and len(values) == 1 and all(places):
        keys = {f"MODEL.BNEXT.{place}.EPS": min(values) for place in places}

    call = f"for path, eps in {dict(wanted)}.items():\n"
    call += "    for part in model.get_submodule(path).modules():\n        part.eps = eps"
    if any(norm.type_name.startswith("bnext.") for norm in norms):
        call += "\n    norm = model.get_submodule(path)\n    norm.spec = norm.spec.replace(eps=eps)"
    return Remedy("Use the eps with which the weights were trained.", keys=keys, call=call)


CHECK = Check(
    code="BN018",
    name="eps-differs",
    title="eps is not the one that the weights were trained with",
    explanation=(
        "`scale = weight / sqrt(var + eps)`: another eps changes the outputs of channels whose variance is small, in "
        "every block. Frozen norms of other libraries had eps 0, or none of their own; conversions forget it. In "
        "float16 it must be large enough to be a number. An unusual eps that all norms share is none of this."
    ),
    cost="",
    source="vision#2169, vision#2599",
    depth="static",
    examine=_examine,
)

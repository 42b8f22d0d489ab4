"""BN029: norms that are less than they were before a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bnext.diagnostics.facts import Affine, Facts, NormFacts, Population
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.initial_state import find_unwritten
from bnext.errors import list_few

__all__ = ["CHECK"]

_ROUNDING = 2e-3  # relative; values that went to half precision and back differ by half of it
_ADVICE = (
    "Convert with bnext.convert_norm, which carries state and settings over, and refuses what it would lose; or repair "
    "the norms that are named."
)
_CONVERT = 'bnext.convert_norm(before, {"": "SyncBN"})  # of the model before; "BN" and other names, too'


def _examine(facts: Facts) -> Iterator[Evidence]:
    if facts.before is None:
        return

    after = {norm.path: norm for norm in facts.norms}
    pairs = [(norm, after[norm.path]) for norm in facts.before if norm.is_batch_norm and norm.path in after]
    pairs = [(old, new) for old, new in pairs if new.is_batch_norm]  # another kind of norm was asked for

    yield from _find_missing(facts, facts.before, after)
    yield from _find_classes(pairs)
    yield from _find_parts(pairs)
    yield from _find_momenta(pairs)
    yield from _find_values(pairs)


def _judge(severity: Severity, paths: Sequence[str], text: str, call: str = _CONVERT) -> Evidence:
    return Evidence(severity, tuple(paths), text, Remedy(_ADVICE, call=call), {"norms": float(len(paths))})


def _find_missing(facts: Facts, before: Sequence[NormFacts], after: Mapping[str, NormFacts]) -> Iterator[Evidence]:
    gone = [norm.path for norm in before if norm.is_batch_norm and norm.path not in after]
    dropped = [path for path in gone if path not in facts.folded]
    if len(dropped) == len(before):
        return  # a model with other names

    if dropped:
        yield _judge("error", dropped, f"{len(dropped)} of {len(before)} norms are gone.")
    elif gone:
        text = f"{len(gone)} of {len(before)} norms do nothing now: they were folded, or taken out."
        remedy = Remedy("See that outputs at inference are what they were.", call="bnext.fold_norms(before.eval())")
        yield Evidence("note", tuple(gone), text, remedy, {"norms": float(len(gone))})


def _find_classes(pairs: Sequence[tuple[NormFacts, NormFacts]]) -> Iterator[Evidence]:
    """A class that computes more than its base, and what is in its place."""
    lost: dict[tuple[str, str], list[NormFacts]] = {}
    for old, new in pairs:
        is_replaced = old.has_own_forward and not new.has_own_forward
        extras = set(old.extras) - set(new.extras)
        if old.type_name != new.type_name and (is_replaced or extras):
            lost.setdefault((old.record.kind, new.record.kind), []).append(old)

    for (old_kind, new_kind), norms in lost.items():
        names = sorted({name for norm in norms for name in norm.extras})
        text = f"{len(norms)} norms were {old_kind}, and are {new_kind}, which does not compute what their class did"
        text += f" and does not have its {list_few(names)}." if names else "."
        has_forward = any(norm.has_own_forward for norm in norms)
        yield _judge("error" if has_forward else "warning", [norm.path for norm in norms], text)


def _find_parts(pairs: Sequence[tuple[NormFacts, NormFacts]]) -> Iterator[Evidence]:
    """Whole affines and populations."""
    for part, words in (("affine", "a scale and shift"), ("population", "population statistics")):
        lost = [old.path for old, new in pairs if _has(old, part) and not _has(new, part)]
        if lost:
            yield _judge("error", lost, f"{len(lost)} norms had {words}, and have none now.")

    new_ones = [new for old, new in pairs if not _has(old, "population") and _has(new, "population")]
    unwritten = [new.path for new in new_ones if find_unwritten(new)]
    if unwritten:
        text = f"{len(unwritten)} norms kept no population statistics, and now normalize by ones that nobody wrote."
        call = "bnext.recompute_population_statistics(model, data)"
        yield _judge("warning", unwritten, text, call)


def _has(norm: NormFacts, part: str) -> bool:
    return str(getattr(norm.record, part)) != "none"


def _find_momenta(pairs: Sequence[tuple[NormFacts, NormFacts]]) -> Iterator[Evidence]:
    changed = []
    for old, new in pairs:
        is_moving = all(norm.is_by_mini_batch and _has(norm, "population") for norm in (old, new))
        if is_moving and old.record.momentum != new.record.momentum:
            changed.append((old, new))
    if not changed:
        return

    momenta = [sorted({str(norm.record.momentum) for norm in norms}) for norms in zip(*changed, strict=True)]
    text = f"{len(changed)} norms had momentum {list_few(momenta[0])}, and have {list_few(momenta[1])}."
    values = {old.path: old.record.momentum for old, _ in changed}
    call = f"for path, momentum in {values}.items():\n    model.get_submodule(path).momentum = momentum"
    yield _judge("warning", list(values), text, call)


def _find_values(pairs: Sequence[tuple[NormFacts, NormFacts]]) -> Iterator[Evidence]:
    lost: list[str] = []
    other: list[str] = []
    for old, new in pairs:
        if _are_equal(old.populations, new.populations) and _are_equal(old.affines, new.affines):
            continue
        is_lost = bool(find_unwritten(new)) and not find_unwritten(old)
        (lost if is_lost else other).append(new.path)

    if lost:
        text = f"{len(lost)} norms had population statistics, and have mean 0 and variance 1 now: they were not copied."
        yield _judge("error", lost, text)
    if other:
        text = f"{len(other)} norms have other statistics, or another scale or shift, than before."
        yield _judge("warning", other, text)


def _are_equal(old: Sequence[Population | Affine], new: Sequence[Population | Affine]) -> bool:
    """Whether everybody has what it had: its own, or what all shared; where several became one nobody can say."""
    before = {part.owner: part for part in old}
    for part in new:
        source = before.get(part.owner, before.get(""))
        if source is not None and not all(_is_same(*values) for values in _pair(source, part)):
            return False
    return True


def _pair(old: Population | Affine, new: Population | Affine) -> list[tuple[Tensor | None, Tensor | None]]:
    names = ("mean", "var") if isinstance(old, Population) else ("weight", "bias")
    return [(getattr(old, name), getattr(new, name)) for name in names]


def _is_same(old: Tensor | None, new: Tensor | None) -> bool:
    if old is None or new is None:
        return True
    if old.shape != new.shape:
        return False
    scale = float(old.abs().nan_to_num(posinf=0.0).max()) if old.numel() else 0.0
    return torch.allclose(old, new, rtol=_ROUNDING, atol=_ROUNDING * 1e-3 * scale, equal_nan=True)


CHECK = Check(
    code="BN029",
    name="lost-in-conversion",
    title="a conversion of norms has lost something",
    explanation=(
        "`convert_sync_batchnorm` and its likes make a norm of the state that they know: what a subclass computes "
        "besides (an activation, a drop-out, another forward), hooks, and settings that they do not copy are gone, "
        "without a word. A class that somebody vouches for with `bnext.register_form` computes nothing else."
    ),
    cost="",
    source="pytorch#187298, pytorch-image-models#1254",
    depth="static",
    examine=_examine,
)

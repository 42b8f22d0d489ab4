"""BN019: running statistics in another convention: an inverse standard deviation, a standard deviation, a factor."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy
from bnext.diagnostics.measures.merged_calls import merge_calls
from bnext.diagnostics.re_estimation import advise_reestimation

__all__ = ["CHECK"]

_INVERSE, _DEVIATION, _FACTOR = "an inverse standard deviation", "a standard deviation", "a sum of weights as factor"
_POWERS = {_INVERSE: -0.5, _DEVIATION: 0.5}  # of the variance that the stored value is

# All of logarithms. A relation holds if half of the channels are within 28 % of it, a quarter as far from it as from
# the variance itself, and if both vary together over the channels: those of one layer may be nearly equal.
_CLOSE, _TIMES, _CORRELATION, _SLOPE = 0.25, 4.0, 0.8, 0.15
_LEAST_FACTOR = math.log(5)  # Caffe's is 1,000 after some thousand steps
_FEWEST = 8  # channels of a norm; those of smaller ones are looked at together

_NAMES = {
    _FACTOR: re.compile(r"scale_factor"),
    _INVERSE: re.compile(r"(running|moving|saved)?_?(inv(erse)?_?(std|var|deviation)\w*|rstd|r?invstd)"),
    _DEVIATION: re.compile(r"(running|moving)_std\w*"),
}


@dataclasses.dataclass(frozen=True)
class _Channels:
    """Stored and seen values of the same channels: means and logarithms of variances."""

    seen_mean: Tensor
    stored_mean: Tensor
    seen: Tensor
    stored: Tensor


def _examine(facts: Facts) -> Iterator[Evidence]:
    seen = _classify_norms(facts)
    for kind, factors in seen.items():
        yield _judge(facts, kind, factors)
    if facts.weights is None:
        return

    norms = {norm.path for norm in facts.batch_norms} | set(facts.weights.missing)
    for kind, pattern in _NAMES.items():
        entries = [name for name in facts.weights.unexpected if pattern.fullmatch(name.rpartition(".")[2])]
        paths = [path for path in dict.fromkeys(name.rpartition(".")[0] for name in entries) if path in norms]
        if paths and kind not in seen:
            yield _judge_names(facts, kind, entries, paths)


# ---- by what norms get


def _classify_norms(facts: Facts) -> dict[str, dict[str, float]]:
    """Kind -> path -> factor of the stored variance; norms that are too small to tell are looked at together.

    A file has one convention, so half of its norms must agree. Behind a frozen norm that normalizes wrongly nothing
    can be seen: there the first one decides for all.
    """
    merged = merge_calls(facts, "mini_batch")
    channels: dict[str, _Channels] = {}
    for norm in facts.batch_norms:
        if norm.path in merged and len(norm.populations) == 1:
            channels[norm.path] = _read(norm, merged[norm.path].mean, merged[norm.path].var)

    kinds: dict[str, dict[str, float]] = {}
    small: dict[str, _Channels] = {}
    for path, one in channels.items():
        kind = _classify(one)
        if kind:
            kinds.setdefault(kind, {})[path] = _measure_factor(one)
        elif len(one.seen) < _FEWEST:
            small[path] = one

    together = _join(list(small.values()))
    kind = _classify(together)
    if kind:
        kinds.setdefault(kind, {}).update(dict.fromkeys(small, _measure_factor(together)))

    number = len(channels) if kind else len(channels) - len(small)
    agreed = {kind: paths for kind, paths in kinds.items() if 2 * len(paths) >= number}
    frozen = [norm.path for norm in facts.batch_norms if norm.record.frozen in ("statistics", "both")]
    first = next(iter(channels), "")
    for kind, paths in kinds.items():
        if first in frozen and first in paths and kind not in agreed:
            agreed[kind] = dict.fromkeys([path for path in channels if path in frozen], paths[first])
    return agreed


def _read(norm: NormFacts, mean: Tensor, var: Tensor) -> _Channels:
    population = norm.populations[0]
    if len(var) != len(population.var) or len(population.mean) != len(population.var):
        return _join([])
    least = 10 * max(norm.record.eps, 1e-12)  # below it eps decides
    is_good = torch.isfinite(var) & (var > least) & torch.isfinite(population.var) & (population.var > 0)
    is_good &= torch.isfinite(population.mean)
    return _Channels(mean[is_good], population.mean[is_good], var[is_good].log(), population.var[is_good].log())


def _join(parts: Sequence[_Channels]) -> _Channels:
    fields = [field.name for field in dataclasses.fields(_Channels)]
    empty = torch.zeros(0, dtype=torch.float64)
    return _Channels(**{name: torch.cat([empty, *(getattr(part, name) for part in parts)]) for name in fields})


def _classify(channels: _Channels) -> str:
    """Kind of the stored values; "" for variances, and where it cannot be told."""
    seen, stored = channels.seen, channels.stored
    if len(seen) < _FEWEST:
        return ""
    distance = float((stored - seen).abs().median())
    by_seen, by_stored = seen - seen.mean(), stored - stored.mean()
    slope = float((by_seen * by_stored).sum() / by_seen.square().sum().clamp(min=1e-12))
    correlation = slope * float(by_seen.norm() / by_stored.norm().clamp(min=1e-12))

    for kind, power in _POWERS.items():
        rest = float((stored - power * seen).abs().median())
        is_close = rest < min(_CLOSE, distance / _TIMES, _measure_way(channels))
        if is_close and abs(correlation) > _CORRELATION and abs(slope - power) < _SLOPE:
            return kind

    offset = float((stored - seen).median())
    is_constant = float((stored - seen - offset).abs().median()) < _CLOSE
    if is_constant and offset > _LEAST_FACTOR and abs(_measure_mean_factor(channels) - offset) < _CLOSE:
        return _FACTOR
    return ""


def _measure_way(channels: _Channels) -> float:
    """Distance to the nearest moving average on its way from 1 to the variance: over some channels that is a root."""
    weights = torch.linspace(0, 0.95, 20, dtype=torch.float64).unsqueeze(1)
    on_the_way = (weights + (1 - weights) * channels.seen.exp()).log()
    return float((channels.stored - on_the_way).abs().median(1).values.min())


def _measure_factor(channels: _Channels) -> float:
    return math.exp(float((channels.stored - channels.seen).median()))


def _measure_mean_factor(channels: _Channels) -> float:
    """Logarithm of the factor of the stored means; NaN where means are too small to tell, or not proportional."""
    seen, stored = channels.seen_mean, channels.stored_mean
    power = seen.square().sum()
    factor = float((seen * stored).sum() / power.clamp(min=1e-12))
    rest = float((stored - factor * seen).square().sum() / stored.square().sum().clamp(min=1e-12))
    is_visible = float((seen.square() / channels.seen.exp()).mean()) > 1e-3
    return math.log(factor) if factor > 0 and rest < 0.25 and is_visible else float("nan")


# ---- what is said of it


def _judge(facts: Facts, kind: str, factors: Mapping[str, float]) -> Evidence:
    numbers = {"norms": float(len(factors))}
    if kind == _FACTOR:
        numbers["factor"] = sorted(factors.values())[len(factors) // 2]
        text = (
            f"The running means and variances of {len(factors)} of {len(facts.batch_norms)} norms are both "
            f"{numbers['factor']:.3g} times what the images give: they are sums, which Caffe divides by a scale_factor."
        )
    else:
        text = (
            f"The running variance of {len(factors)} of {len(facts.batch_norms)} norms is {kind}: over their channels "
            f"it goes as the power {_POWERS[kind]:g} of the variance that the images give."
        )
    return Evidence("error", tuple(factors), text, _advise(facts, kind, tuple(factors)), numbers)


def _judge_names(facts: Facts, kind: str, entries: Sequence[str], paths: Sequence[str]) -> Evidence:
    text = (
        f"Beside the state of {len(paths)} norms there is {kind} ({entries[0]}), which no norm of torch has or heeds: "
        "the statistics may be in the convention of another framework."
    )
    return Evidence("warning", tuple(paths), text, _advise(facts, kind, paths), {"norms": float(len(paths))})


def _advise(facts: Facts, kind: str, paths: Sequence[str]) -> Remedy:
    eps = max((norm.record.eps for norm in facts.batch_norms if norm.path in set(paths)), default=1e-5)
    text = (
        f"bnext.surgery.read_caffe_state(state, holds_inverse_std={kind == _INVERSE}, eps={eps:g}) reads such a state."
    )
    if kind == _DEVIATION:
        text = "Square the values, where they are read."
    if facts.origin.kind != "model" or kind == _FACTOR:
        return advise_reestimation(facts, paths, f"{text} Or:")

    chosen = (
        "" if 2 * len(paths) >= len(facts.batch_norms) else f" if key.startswith({tuple(f'{p}.' for p in paths)!r})"
    )
    change = f"bnext.surgery.read_caffe_state(state, holds_inverse_std=True, eps={eps:g})"
    if kind == _DEVIATION:
        change = '{key: value.square() for key, value in state.items() if key.endswith("running_var")}'
    call = (
        f"state = {{key: value for key, value in model.state_dict().items(){chosen}}}\n"
        f"model.load_state_dict({change}, strict=False)"
    )
    return Remedy(f"{text} Or estimate the population statistics anew.", call=call)


CHECK = Check(
    code="BN019",
    name="inverse-deviation",
    title="a running variance that is none: an inverse or plain standard deviation, or a sum that needs a factor",
    explanation=(
        "Some files hold `1 / sqrt(var + eps)` or `sqrt(var)` under the name of a variance, and Caffe's norm holds "
        "sums of means and variances, beside a `scale_factor` by which both are to be divided. Loaded as they are they "
        "normalize wrongly without an error. That cannot be seen from values alone, but by comparison with the "
        "mini-batches of some images, over the channels of a norm, or by the names in a file."
    ),
    cost="",
    source="",
    depth="forward",
    examine=_examine,
)

"""Numbers of the norms along the depth of a model, as charts show them: quantiles over channels, and distances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bnext.diagnostics.facts import Facts, ForwardFacts, NormFacts, Population
from bnext.functional import Moments, merge_moments

__all__ = [
    "QUANTILES",
    "Comparison",
    "Distances",
    "Profile",
    "Shift",
    "compare_populations",
    "divide_depth",
    "measure_distances",
    "profile_norms",
    "summarize",
]

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
Summary = tuple[float, ...] | None  # at QUANTILES over the channels; None: no finite number

_MOST_OWNERS = 16  # levels, domains or calls in a matrix that a person reads
_MOST_CELLS = 120_000  # of all matrices together: 1 MB of a page


@dataclasses.dataclass(frozen=True)
class Profile:
    """State of a norm, of one level or domain.

    Args:
        path: of the norm.
        owner: level or domain; "": all.
        mean, std: of the running statistics.
        weight: scale of the affine.
        num_invalid: channels whose statistics are not finite, or whose variance is negative.
    """

    path: str
    owner: str
    mean: Summary = None
    std: Summary = None
    weight: Summary = None
    num_invalid: int = 0


@dataclasses.dataclass(frozen=True)
class Shift:
    """Running statistics of a norm against what it gets.

    Args:
        path, owner: as in `Profile`.
        distance: |running mean - mean| in running standard deviations.
        ratio: standard deviation over the running one.
    """

    path: str
    owner: str
    distance: Summary
    ratio: Summary


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Moving averages against a population.

    Args:
        num_images: that the population was measured on; None: a pass over training images.
        shifts: of all norms that have both.
    """

    num_images: int | None
    shifts: tuple[Shift, ...]


@dataclasses.dataclass(frozen=True)
class Distances:
    """Distances between the features of a norm.

    Args:
        kind: between what: "domains", "levels" (or calls) of a forward, or "stored" statistics.
        path: of the norm.
        names: of the rows and columns.
        means: [i][j], |mean_i - mean_j| in the standard deviations of both, mean over channels.
        ratios: [i][j], standard deviations, the larger over the smaller: geometric mean over channels.
    """

    kind: str
    path: str
    names: tuple[str, ...]
    means: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]

    @property
    def largest(self) -> float:
        """The distance of the two that are farthest apart."""
        return max((value for row in self.means for value in row if math.isfinite(value)), default=0.0)

    @property
    def is_alike(self) -> bool:
        """Whether there is no difference at all."""
        return self.largest == 0 and all(value == 1 for row in self.ratios for value in row)


def summarize(values: Tensor) -> Summary:
    """Quantiles over channels, of those that are finite.

    Args:
        values: [C].

    Example:
        >>> summarize(torch.arange(11.0))
        (0.0, 1.0, 5.0, 9.0, 10.0)
    """
    values = values[values.isfinite()].double()
    if not values.numel():
        return None
    quantiles = torch.tensor(QUANTILES, dtype=values.dtype)
    return tuple(torch.quantile(values, quantiles).tolist())


def profile_norms(facts: Facts) -> list[Profile]:
    """State of all norms in the order of the model; of a norm with levels or domains that of each.

    Args:
        facts: the populations and affines of its norms are read.
    """
    profiles = []
    for norm in facts.norms:
        weights = {affine.owner: summarize(affine.weight) for affine in norm.affines if affine.weight is not None}
        shared = weights.get("")

        for population in norm.populations:
            std = population.var.sqrt()  # NaN where it is negative
            num_invalid = int((~(population.mean.isfinite() & std.isfinite())).sum())
            weight = weights.pop(population.owner, shared)
            summaries = summarize(population.mean), summarize(std), weight
            profiles.append(Profile(norm.path, population.owner, *summaries, num_invalid))

        if not norm.populations or shared is None:
            profiles += [Profile(norm.path, owner, weight=weight) for owner, weight in weights.items()]
    return profiles


# ---- moving averages against populations


def compare_populations(facts: Facts) -> Comparison | None:
    """Running statistics against a pass over training images, or else against the batches that were run.

    Args:
        facts: `population`, or forwards of real images.

    Returns:
        None: neither is there.
    """
    forwards = _find_forwards(facts)
    shifts = []
    for norm in facts.norms:
        for population in norm.populations:
            moments = facts.population.get((norm.path, population.owner))
            if moments is None and not facts.population:
                moments = _find_moments(norm, population.owner, forwards)
            if moments is not None and moments.mean.shape == population.mean.shape:
                shifts.append(_measure_shift(norm, population, moments))

    if not shifts:
        return None
    return Comparison(None if facts.population else sum(forward.num_images for forward in forwards), tuple(shifts))


def _measure_shift(norm: NormFacts, population: Population, moments: Moments) -> Shift:
    eps = norm.record.eps
    var = moments.var if math.isinf(float(moments.count)) else moments.unbiased_var()
    std = (population.var + eps).sqrt()
    distance = (moments.mean.to(std) - population.mean).abs() / std
    return Shift(norm.path, population.owner, summarize(distance), summarize((var.to(std) + eps).sqrt() / std))


def _find_moments(norm: NormFacts, owner: str, forwards: Sequence[ForwardFacts]) -> Moments | None:
    """Moments of the features of one population of a norm."""
    by_call = _gather_calls(norm.path, forwards)
    if not owner:
        return _merge([moments for of_call in by_call.values() for moments in of_call])
    if owner in by_call:
        return _merge(by_call[owner])

    in_domain = [forward for forward in forwards if forward.domain == owner]
    if in_domain:
        return _merge([moments for of_call in _gather_calls(norm.path, in_domain).values() for moments in of_call])

    owners = [population.owner for population in norm.populations]
    if len(by_call) != len(owners):
        return None
    return _merge(list(by_call.values())[owners.index(owner)])  # a head that cannot name its levels


# ---- distances


def measure_distances(facts: Facts) -> list[Distances]:
    """Distances between domains, between the features of a forward, and between stored statistics that are
    not all alike, in this order.

    Args:
        facts: `domains`, forwards of real images, and the populations of norms are read.

    Note:
        Of very many norms those are kept whose features are farthest apart.
    """
    eps = {norm.path: norm.record.eps for norm in facts.norms}
    kept: list[Distances] = []
    for kind, by_path in _gather_kinds(facts).items():
        measured = [_measure(kind, path, moments, eps[path]) for path, moments in by_path.items()]
        if kind == "stored" and all(one.is_alike for one in measured):
            continue  # as initialized
        most = max(1, _MOST_CELLS // max((len(one.names) ** 2 for one in measured), default=1))
        farthest = {one.path for one in sorted(measured, key=lambda one: -one.largest)[:most]}
        kept += [one for one in measured if one.path in farthest]
    return kept


def _gather_kinds(facts: Facts) -> dict[str, dict[str, dict[str, Moments]]]:
    """Kind -> path -> name -> moments [C], of norms where there are two of equal channels."""
    forwards = _find_forwards(facts)
    kinds: dict[str, dict[str, dict[str, Moments]]] = {"domains": {}, "levels": {}, "stored": {}}
    domains = _find_domains(facts, forwards)

    for norm in facts.norms:
        of_kinds = {
            "domains": {name: by_path[norm.path] for name, by_path in domains.items() if norm.path in by_path},
            "levels": _merge_all(_gather_calls(norm.path, forwards)),
            "stored": {one.owner: Moments(torch.tensor(math.inf), one.mean, one.var) for one in norm.populations},
        }
        for kind, by_name in of_kinds.items():
            if len(by_name) > 1 and len({moments.mean.shape for moments in by_name.values()}) == 1:
                kinds[kind][norm.path] = by_name
    return kinds


def _find_domains(facts: Facts, forwards: Sequence[ForwardFacts]) -> Mapping[str, Mapping[str, Moments]]:
    """Domain -> path -> moments: those of the facts, else those of forwards of one domain each."""
    if facts.domains:
        return facts.domains

    domains: dict[str, dict[str, Moments]] = {}
    for name in dict.fromkeys(forward.domain for forward in forwards if forward.domain):
        in_domain = [forward for forward in forwards if forward.domain == name]
        paths = dict.fromkeys(path for forward in in_domain for path in forward.calls)
        merged = {path: _merge(_flatten(_gather_calls(path, in_domain))) for path in paths}
        domains[name] = {path: moments for path, moments in merged.items() if moments is not None}
    return domains


def _measure(kind: str, path: str, by_name: Mapping[str, Moments], eps: float) -> Distances:
    names = tuple(by_name)[:_MOST_OWNERS]
    mean = torch.stack([by_name[name].mean.double() for name in names])
    var = torch.stack([by_name[name].var.double() for name in names]) + eps

    distance = (mean[:, None] - mean).abs() / ((var[:, None] + var) / 2).sqrt()
    log_ratio = (var[:, None] / var).log().abs() / 2
    means, ratios = distance.mean(-1), log_ratio.mean(-1).exp()
    return Distances(kind, path, names, tuple(map(tuple, means.tolist())), tuple(map(tuple, ratios.tolist())))


# ---- what forwards saw


def _find_forwards(facts: Facts) -> list[ForwardFacts]:
    """Forwards of real batches: as in training, where there are such ones."""
    real = [forward for forward in facts.forwards if not forward.is_noise and not forward.is_alone]
    return [forward for forward in real if forward.normalized_by == "mini_batch"] or real


def _gather_calls(path: str, forwards: Sequence[ForwardFacts]) -> dict[str, list[Moments]]:
    """Level, or number of the call, -> moments of the samples of each forward."""
    gathered: dict[str, list[Moments]] = {}
    for forward in forwards:
        for number, call in enumerate(forward.calls.get(path, ()), 1):
            gathered.setdefault(call.level or f"call {number}", []).append(call.samples)
    return gathered


def _flatten(by_call: Mapping[str, list[Moments]]) -> list[Moments]:
    return [moments for of_call in by_call.values() for moments in of_call]


def _merge(parts: Sequence[Moments]) -> Moments | None:
    """Moments [C] of all samples; None: there is no element."""
    with_samples = [part for part in parts if part.count.numel() and float(part.count.sum()) > 0]
    if not with_samples or len({part.mean.shape[1] for part in with_samples}) > 1:
        return None
    return merge_moments(Moments(*(torch.cat(fields) for fields in zip(*with_samples, strict=True))))


def _merge_all(by_name: Mapping[str, list[Moments]]) -> dict[str, Moments]:
    merged = {name: _merge(parts) for name, parts in by_name.items()}
    return {name: moments for name, moments in merged.items() if moments is not None}


def divide_depth(paths: Sequence[str], most: int = 12) -> Iterator[tuple[str, int, int]]:
    """Parts of a model along its norms: (name, first, last + 1), as many as fit under an axis.

    Args:
        paths: of the norms, in the order of the model.
        most: parts.

    Example:
        >>> list(divide_depth(["stem.norm", "res2.0.norm", "res2.1.norm"], most=2))
        [('stem', 0, 1), ('res2', 1, 3)]
    """
    runs: list[tuple[str, int, int]] = []
    for depth in range(1, 9):
        finer = _find_runs([".".join(path.split(".")[:-1][:depth]) or path for path in paths])
        has_numbers = any(name.rpartition(".")[2].isdigit() for name, _, _ in finer)
        if runs and (finer == runs or len(finer) > most or (len(runs) > 1 and has_numbers)):
            break
        runs = finer
    for prefix, first, last in runs:
        yield _shorten(prefix), first, last


def _shorten(prefix: str) -> str:
    """The last part of a path that is no number, and the numbers after it."""
    parts = prefix.split(".")
    first = max((place for place, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])


def _find_runs(prefixes: Sequence[str]) -> list[tuple[str, int, int]]:
    runs: list[tuple[str, int, int]] = []
    for place, prefix in enumerate(prefixes):
        if runs and runs[-1][0] == prefix:
            runs[-1] = prefix, runs[-1][1], place + 1
        else:
            runs.append((prefix, place, place + 1))
    return runs

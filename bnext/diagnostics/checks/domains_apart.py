"""BN023: domains whose statistics are far apart, in norms that keep one population for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy, Severity
from bnext.diagnostics.measures.gaps import find_gap
from bnext.functional import Moments
from bnext.layers.sources import add_domains

__all__ = ["CHECK"]

# Standard deviations between means, root mean square over channels. Halves of one data set are below 0.1 with enough
# images; from 0.6 on more than a fifth of the elements changes sides of a ReLU.
_NOTABLE, _FAR = 0.3, 0.6
_LEAST_Z = 4.0  # standard errors, which four images of each domain know well enough
_LEAST_SHARE = 0.1  # of the norms: the first layers see a shift that a network removes by itself


def _examine(facts: Facts) -> Iterator[Evidence]:
    shared = [norm for norm in facts.batch_norms if norm.is_by_mini_batch and norm.record.population == "shared"]
    distances: dict[str, tuple[float, str, str]] = {}
    for norm in shared:
        of_pairs = _measure(facts, norm.path)
        if of_pairs:
            distances[norm.path] = max(of_pairs)

    notable = {path: one for path, one in distances.items() if one[0] >= _NOTABLE}
    far = {path: one for path, one in distances.items() if one[0] >= _FAR}
    if len(far) >= max(1.0, _LEAST_SHARE * len(distances)):
        yield _judge(facts, far, len(distances), is_far=True)
    elif notable and len(notable) >= _LEAST_SHARE * len(distances):
        yield _judge(facts, notable, len(distances), is_far=False)


def _measure(facts: Facts, path: str) -> list[tuple[float, str, str]]:
    """Distance of each two domains at a norm, and their names."""
    found = {name: of_norms[path] for name, of_norms in facts.domains.items() if path in of_norms}
    pairs = []
    for one, other in itertools.combinations(sorted(found), 2):
        noise = [facts.domain_errors.get(name, {}).get(path) for name in (one, other)]
        distance = _find_distance(found[one], found[other], [error for error in noise if error is not None])
        if distance is not None:
            pairs.append((distance, one, other))
    return pairs


def _find_distance(one: Moments, other: Moments, errors: Sequence[Tensor]) -> float | None:
    if not float(one.count) or not float(other.count) or one.mean.shape != other.mean.shape:
        return None
    var = ((one.var + other.var) / 2).clamp(min=1e-12)  # a dead channel is no distance
    square = float(((one.mean - other.mean).square() / var).mean())
    by_chance = sum(float((error.square() / var).mean()) for error in errors)
    if not math.isfinite(square) or not square > _LEAST_Z**2 * by_chance:
        return None
    return math.sqrt(square)


def _judge(facts: Facts, seen: dict[str, tuple[float, str, str]], number: int, *, is_far: bool) -> Evidence:
    distance, one, other = max(seen.values())
    is_mixed = facts.training is not None and facts.training.mixes_domains
    text = (
        f"What {len(seen)} of {number} norms get of the domains {one!r} and {other!r} differs in its means by up to "
        f"{distance:.2g} standard deviations (root mean square), and one population normalizes both at inference. "
    )
    if is_mixed:
        text += "Mini-batches hold images of both, so that training does the same: statistics for each may gain more."
    else:
        text += "Where a mini-batch is of one domain, training normalizes each by itself and inference does not."

    severity: Severity = "warning" if is_far and not is_mixed else "note"
    gap = find_gap(facts.evaluation, "mini_batch")
    if severity == "warning" and gap is not None and gap.is_wrong:
        severity = "error"
    numbers = {"norms": float(len(seen)), "distance": distance}
    return Evidence(severity, tuple(seen), text, _advise(facts, tuple(seen)), numbers)


def _advise(facts: Facts, paths: tuple[str, ...]) -> Remedy:
    names = tuple(sorted(facts.domains))
    is_config = facts.origin.kind == "config"
    whose = "that of its data set" if is_config else "said in code (`with bnext.use_domain(name)`)"
    text = f"Give each domain its own statistics, where the domain of an image is {whose}; "
    text += "or mix the domains in every mini-batch."
    spec = f"NormSpec(statistics='per_domain', population='per_domain', domains={names!r})"
    call = f"from bnext import NormSpec, convert_norm\nconvert_norm(model, {{'': {spec}}})"
    if not is_config:
        return Remedy(text, call=call)

    norms = sorted((norm for norm in facts.norms if norm.path in paths and norm.place), key=lambda norm: norm.place)
    keys: dict[str, object] = {"MODEL.BNEXT.DOMAINS.NAMES": names} if norms else {}
    for norm in norms:
        answers = {"STATISTICS": norm.record.statistics, "POPULATION": norm.record.population}
        keys |= {f"MODEL.BNEXT.{norm.place}.{key}": add_domains(answer) for key, answer in answers.items()}
    return Remedy(text, keys=keys, call=call)


CHECK = Check(
    code="BN023",
    name="domains-apart",
    title="domains with different statistics share one population",
    explanation=(
        "One population stands for all domains that a model sees. If mini-batches are of one domain each, training "
        "normalizes every domain by its own statistics and inference by a mixture that none of them has. If they are "
        "mixed, both do the same, and a domain far from the others is normalized badly in both. Alike domains gain "
        "nothing by statistics of their own."
    ),
    cost="40.8 instead of 33.1 % error (ResNet-50 on ImageNet-C, contrast) with the statistics of another domain",
    source="Wu and Johnson 2021, section 5",
    depth="forward",
    examine=_examine,
    points=7.7,
)

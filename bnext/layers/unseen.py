"""Samples of a domain that a norm has not, or of none: what normalizes them at inference, by a declared rule.

    mixture      the populations of all domains, merged with equal weight
    mini_batch   each image's own statistics
    blend        (S * mixture + image) / (S + 1), the moments of the union of S images like the mixture and the image
    stream       (S * mixture + n * stream) / (S + n), of n images of unseen domains so far, of which the last 64
                 count; an image that is far from what the norm has come to begins anew, or leads back to the mixture
    nearest      the population, and the affine, of the domain that is nearest to the image's statistics

S is `source_images`: with 0 a blend is the image's own statistics, with infinity it is the mixture. "auto" gives the
image's statistics the share that is left of their distance d from the mixture when that of any single image is taken
off, as the estimator of James and Stein does: 1 - 1/d^2, or 0. Where the affine belongs to domains, the mean of all
weights and biases scales and shifts, but for "nearest". The RoIs of an image are its mini-batch.

The rules "error" and "fallback" need no more than a look at names: see `OwnedBatchNorm2d.find_domains`. What an image
is nearest to is found once in a forward, by its first norm that has a population for each domain, and holds in all
others.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bnext.dispatch import is_exported, is_ordinary, is_traced, is_transformed
from bnext.errors import DomainError, Refusal
from bnext.functional import (
    Moments,
    group_moments,
    make_index,
    merge_moments,
    normalize_parts,
    part_moments,
    stack_parts,
)
from bnext.layers.counts import UnseenCount, counts_of
from bnext.layers.sources import is_per_domain
from bnext.layers.spec import NormSpec, Unseen
from bnext.layers.streams import Stream, keep_near
from bnext.notices import tell_once
from bnext.scope.call import NormCall
from bnext.scope.recomputation import is_recomputing
from bnext.scope.record import Scope, close_scopes
from bnext.scope.statistics import answering

if TYPE_CHECKING:
    from bnext.layers.batch_norm import BatchNorm2d

__all__ = [
    "UNSEEN",
    "UnseenImages",
    "applying_rule",
    "beginning_streams",
    "forget_stream",
    "is_unseen",
    "normalize_unseen",
    "one_forward",
    "settle_unseen",
    "tell_forwards",
]

log = logging.getLogger(__name__)

UNSEEN = "unseen."  # among the names of domains, none of which has a dot
# Squared distance of a single image of the source from its population, a mean over channels: of the mean in standard
# deviations, and of the logarithm of the variance. Measured on the norms of a trained detector.
NOISE_OF_MEAN, NOISE_OF_LOG_VAR = 0.1, 0.5
STREAM_MEMORY = 64  # images
STREAM_BOUND = 10.0  # standard deviations of the mixture
# Where images change at once: one whose divergence from the mixture is this part of that from the stream leads back to
# the mixture, and one whose squared distance from the stream is that of so many images begins a stream of its own.
STREAM_RETURN, STREAM_JUMP = 0.5, 6.0

TAKEN = "%s are normalized by the rule %r for unseen domains (first in %s)."
OUTSIDE_OF_FORWARD = Refusal(
    DomainError,
    "the rule 'nearest' for unseen domains",
    "know where a forward begins and ends, as it decides once in each",
    "Call the whole model, or wrap the call of its part in `with one_forward():` of bnext.layers.unseen; a model that "
    "bnext has not built needs tell_forwards(model).",
)
NO_POPULATIONS = Refusal(
    DomainError,
    "the rule 'nearest' for unseen domains",
    "reach a norm with a population for each domain first",
    "Set POPULATION of a place before this one to 'per_domain', or UNSEEN to another rule.",
)
OTHER_IMAGES = Refusal(
    DomainError,
    "every norm of a forward",
    "get the {number} images that the first one got, or know of which image each sample is",
    "Let tell_images(model) tell the norms of RoI heads.",
)
WRITTEN_DOWN = Refusal(
    DomainError,
    "the rule 'nearest' for unseen domains",
    "see the images, and cannot in a forward that is written down",
    "Name the domain, `with use_domain(...)`, or choose another rule.",
)


class UnseenImages:
    """Knowledge that the norms of one forward share of its images of unseen domains.

    Attributes:
        nearest: number of the image in its batch -> domain that was nearest.
        num_images: of the batch; None: no norm has asked.
        counted: norms that have counted the images.
        followed: norms and names of sources whose stream has them.
    """

    def __init__(self) -> None:
        self.nearest: dict[int, str] = {}
        self.num_images: int | None = None
        self.counted: set[nn.Module] = set()
        self.followed: set[tuple[nn.Module, str]] = set()


def is_unseen(name: str) -> bool:
    """Whether a name among those of a norm's domains stands for all that it has not."""
    return name.startswith(UNSEEN)


# ---- what a forward is


def one_forward() -> Scope:
    """Calls of norms in this scope are of one forward: each image is taken for one domain, and counts once."""
    return Scope(images=UnseenImages())


def tell_forwards(model: nn.Module) -> None:
    """Let every call of a model be one forward, see `one_forward`; bnext's architectures have it done. In place."""
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end, always_call=True)


def _begin(model: nn.Module, args: Any) -> None:
    if not (model.training or is_traced() or is_recomputing()):
        Scope(_begin, images=UnseenImages()).__enter__()


def _end(model: nn.Module, args: Any, output: Any) -> None:
    if not is_traced():
        close_scopes(_begin)


def _number_images(features: Sequence[Tensor], call: NormCall) -> tuple[list[Tensor], int]:
    """The image of every sample of each feature, and how many images there are; those without a sample may lack."""
    if call.groups is not None:
        return [call.groups.numbers] * len(features), call.groups.num_groups
    images = [torch.arange(len(feature), device=feature.device) for feature in features]
    return images, max(map(len, features))


# ---- before anything is normalized


def settle_unseen(
    norm: BatchNorm2d,
    features: Sequence[Tensor],
    sources: Sequence[int | tuple[int, ...]],
    names: Sequence[str],
    call: NormCall,
) -> list[int | tuple[int, ...]]:
    """The sources of a call, where "nearest" has a known one for every sample; and count them.

    Args:
        norm: in evaluation mode, with another rule than "error" and "fallback".
        features: [N_l, C, H_l, W_l].
        sources: for each feature the index in `names` of all its samples, or of each.
        names: of the sources that may occur; some stand for unseen domains, see `is_unseen`.
        call: of the norm.

    Raises:
        DomainError: see the module's rule "nearest".
    """
    rule, settled = call.spec.unseen, list(sources)
    if not is_ordinary():
        if rule == "nearest":
            raise WRITTEN_DOWN.of("an export, a compiled model or a transform", norm.where)
        return settled

    images, num_images = _number_images(features, call)
    numbers = [list(range(len(x))) if call.groups is None else call.groups.numbers.tolist() for x in features]
    of_samples = [[d] * len(x) if isinstance(d, int) else list(d) for x, d in zip(features, sources, strict=True)]

    unseen: set[int] = set()  # images
    for indices, of_feature in zip(of_samples, numbers, strict=True):
        unseen.update(image for index, image in zip(indices, of_feature, strict=True) if is_unseen(names[index]))

    nearest: dict[int, str] = {}
    if rule == "nearest" and unseen:
        nearest = _find_nearest(norm, features, of_samples, names, images, unseen, num_images, call)
        settled = []
        for indices, of_feature in zip(of_samples, numbers, strict=True):
            pairs = zip(indices, of_feature, strict=True)
            settled.append(tuple(_replace(norm, names, index, nearest.get(image)) for index, image in pairs))

    _count(norm, max(numbers, key=len), unseen, call)
    return settled


def _replace(norm: BatchNorm2d, names: Sequence[str], index: int, domain: str | None) -> int:
    """The index of a domain in the place of an unseen one."""
    if domain is None or not is_unseen(names[index]):
        return index
    return names.index(norm.list_members(names[index])[norm.spec.domains.index(domain)])


def _count(norm: BatchNorm2d, images: Sequence[int], unseen: set[int], call: NormCall) -> None:
    """Count the images of unseen domains, once in a forward."""
    nearest: dict[int, str] = {}
    if call.images is not None:
        nearest = call.images.nearest
        if norm in call.images.counted:
            return
        call.images.counted.add(norm)

    rule: Any = call.spec.unseen
    if not call.moves or (rule == "nearest" and not unseen <= nearest.keys()):  # a norm before the one that finds it
        return

    domains = call.domain if isinstance(call.domain, tuple) else (call.domain,) * len(images)
    of_images = dict(zip(images, domains, strict=False))
    for image in sorted(unseen):
        name, taken = of_images[image] or None, nearest[image] if rule == "nearest" else ""
        counts_of(norm).unseen[UnseenCount(name, rule, taken)] += 1
        subject = "Images without a domain" if name is None else f"Images of the domain {name!r}"
        tell_once(log, (subject, rule), TAKEN, subject, rule, norm.where)


# ---- the nearest domain


def _find_nearest(
    norm: BatchNorm2d,
    features: Sequence[Tensor],
    of_samples: Sequence[Sequence[int]],
    names: Sequence[str],
    images: Sequence[Tensor],
    unseen: set[int],
    num_images: int,
    call: NormCall,
) -> dict[int, str]:
    """The domain that each image of an unseen one is taken for; by this norm, if none has found it before."""
    forward, domains = call.images, norm.spec.domains
    if forward is None:
        raise OUTSIDE_OF_FORWARD.of("a call outside of one", norm.where)
    if forward.num_images not in (None, num_images):
        raise OTHER_IMAGES.of(num_images, norm.where, number=forward.num_images)

    forward.num_images = num_images
    if unseen <= forward.nearest.keys():
        return {image: forward.nearest[image] for image in unseen}

    # Features whose domains share their populations, as levels may, are one mini-batch.
    sets: dict[tuple[Any, ...], list[int]] = {}
    sources: dict[tuple[Any, ...], Sequence[str]] = {}
    for feature, indices in enumerate(of_samples):
        stand_in = next((names[index] for index in indices if is_unseen(names[index])), None)
        if stand_in is not None:
            candidates = norm.list_members(stand_in)
            states = tuple(map(norm.population_state, candidates))
            sets.setdefault(states, []).append(feature)
            sources[states] = candidates

    if any(len(set(states)) < len(domains) for states in sets):
        by_mini_batch = norm.uses_mini_batch and is_per_domain(call.spec.statistics)
        if is_per_domain(norm.spec.affine) or by_mini_batch:
            raise NO_POPULATIONS.of(f"population={norm.spec.population!r}", norm.where)
        return dict.fromkeys(unseen, domains[0])  # all share what normalizes them here

    distances: list[Tensor] = []
    for states, members in sets.items():
        of_set, image_numbers = [features[i] for i in members], [images[i] for i in members]
        distances.append(_measure_distances(norm, of_set, image_numbers, num_images, sources[states]))
    choices = sum(distances[1:], distances[0]).argmin(1).tolist()

    for image in unseen - forward.nearest.keys():
        forward.nearest[image] = domains[choices[image]]
    return {image: forward.nearest[image] for image in unseen}


@torch.no_grad()
def _measure_distances(
    norm: BatchNorm2d,
    features: Sequence[Tensor],
    images: Sequence[Tensor],
    num_images: int,
    sources: Sequence[str],
) -> Tensor:
    """The distance of the statistics of each image from each population, [I, D]."""
    moments = part_moments(features, images, num_images)
    moments = Moments(moments.count, moments.mean.unsqueeze(1), moments.var.unsqueeze(1))
    return _measure_divergence(moments, norm.stack_populations(sources), norm.eps)


def _measure_divergence(moments: Moments, others: Moments, eps: float) -> Tensor:
    """Symmetric Kullback-Leibler divergence of normal distributions, summed over channels, [..., C] -> [...].

    It does not depend on the scale of a channel.
    """
    var, other = moments.var + eps, others.var + eps
    shift = (moments.mean - others.mean).square()
    return ((var / other + other / var - 2 + shift * (1 / var + 1 / other)) / 2).sum(-1)


# ---- statistics of an image's own


def normalize_unseen(
    norm: BatchNorm2d,
    features: list[Tensor],
    parts: Sequence[int | Tensor],
    names: Sequence[str],
    affine: tuple[Tensor, Tensor],
    populations: Moments,
    call: NormCall,
) -> list[Tensor]:
    """Normalize features some of whose samples are of unseen domains.

    Args:
        norm, features, names, call: as in `settle_unseen`; the names of unseen domains come last.
        parts: for each feature the index in `names` of all its samples, or a tensor [N_l] with that of each.
        affine: weight and bias, [P, C], of each name.
        populations: of each name, mean and var [P, C].

    Note:
        Gradients flow through the statistics of an image, and take its share in a blend, and a stream, for constant.
        A stream moves, unless statistics are frozen, and waits for the device; every worker follows its own. In a
        compiled or exported model it stays where it was.
    """
    images, num_images = _number_images(features, call)
    num_known = sum(not is_unseen(name) for name in names)
    states = [norm.population_state(norm.list_members(name)[0]) for name in names[num_known:]]
    sets = [states.index(state) for state in states]  # of names that share their populations, as levels may

    # Behind the parts of known domains is one for each unseen name and image.
    known, rows, owners = tuple(range(num_known)), list(range(num_known)), list(range(num_known))
    for number, first in enumerate(sets):
        rows += [num_known + number] * num_images
        owners += range(num_known + first * num_images, num_known + (first + 1) * num_images)

    device = affine[0].device
    starts = make_index((*known, *(num_known + number * num_images for number in range(len(sets)))), device)
    steps = make_index((0,) * num_known + (1,) * len(sets), device)
    image_parts = [starts[part] + steps[part] * image for part, image in zip(parts, images, strict=True)]
    row_index, owner_index = make_index(tuple(rows), device), make_index(tuple(owners), device)

    # They get their gradient in `normalize_parts`, as those of a mini-batch.
    with torch.set_grad_enabled(torch.is_grad_enabled() and (is_transformed() or is_exported())):
        seen = group_moments(part_moments(features, image_parts, len(rows)), owner_index, len(rows))
        source = Moments(*(field[row_index].to(seen.mean.dtype) for field in populations))
        is_known = make_index(known, device)
        statistics = [Moments(*(field[is_known] for field in source))]

        for number, name in enumerate(names[num_known:]):
            part = slice(num_known + number * num_images, num_known + (number + 1) * num_images)
            of_source, of_images = (Moments(*(field[part] for field in moments)) for moments in (source, seen))
            statistics.append(_apply_rule(norm, name, of_source, of_images, call))

    merged = Moments(*(torch.cat(fields) for fields in zip(*statistics, strict=True)))
    weight, bias = (vector[row_index] for vector in affine)
    return normalize_parts(features, image_parts, weight, bias, norm.eps, merged, owner_index)


def _apply_rule(norm: BatchNorm2d, name: str, source: Moments, images: Moments, call: NormCall) -> Moments:
    """The statistics that normalize each image, [I, C], of those of the source and its own."""
    spec = call.spec
    if spec.unseen == "stream":
        return _follow(norm, name, source, images, call)

    number = 0.0 if spec.unseen == "mini_batch" else spec.source_images
    return _blend_moments(source, images, number, norm.eps)


def _blend_moments(
    source: Moments, images: Moments, source_images: float | Literal["auto"], eps: float, num_images: float = 1
) -> Moments:
    """The moments of the union of a source that counts as so many images, and of some images.

        share = n / (S + n),  mean = source mean + share (mean' - source mean),
        var = (1 - share) source var + share var' + share (1 - share) (mean' - source mean)^2

    Args:
        source: mean and var [I, C].
        images: count [I], mean and var [I, C]; where the count is below 2 there is no variance, and the source stays.
        source_images: S, 0 to infinity, or "auto": see the module.
        eps: of the norm.
        num_images: n, that the statistics of `images` are of.

    Returns:
        Moments [I, C], whose count says how much of them is the images': infinity, if nothing is.
    """
    if source_images == "auto":
        share = 1 - 1 / (num_images * _measure_shift(source, images, eps)).clamp(min=1)
    else:
        fixed = num_images / (source_images + num_images) if num_images else 0.0
        share = torch.full_like(images.count, fixed)
    share = torch.where(images.count >= 2, share, 0.0)

    weighted = stack_parts([source._replace(count=1 - share), images._replace(count=share)])
    _, mean, var = merge_moments(weighted)
    return Moments(torch.where(share > 0, images.count / share, math.inf), mean, var)


def _measure_shift(source: Moments, images: Moments, eps: float) -> Tensor:
    """Squared distance of each image from the source, [I]: 1 is that of any single image of the source."""
    var = source.var + eps
    of_mean = ((images.mean - source.mean).square() / var).mean(-1)
    of_var = ((images.var + eps) / var).log().square().mean(-1)
    return (of_mean / NOISE_OF_MEAN + of_var / NOISE_OF_LOG_VAR) / 2


# ---- the stream of images

_streams: WeakKeyDictionary[nn.Module, dict[str, Stream]] = WeakKeyDictionary()


def _follow(norm: BatchNorm2d, name: str, source: Moments, images: Moments, call: NormCall) -> Moments:
    """Take in the images, and give the statistics of now to each of them."""
    stream = _streams.setdefault(norm, {}).setdefault(name, Stream(STREAM_MEMORY))
    first = Moments(*(field[:1] for field in source))

    batch = merge_moments(Moments(*(field.double() for field in images)))
    if call.moves and is_ordinary() and batch.count >= 2 and torch.isfinite(batch.mean + batch.var).all():
        followed = set() if call.images is None else call.images.followed
        num_images = 0 if (norm, name) in followed else int((images.count > 0).sum())
        _take_in(stream, first, batch, num_images, norm.eps, call)
        followed.add((norm, name))

    now = _read_stream(stream, first, norm.eps, call)
    return Moments(source.count, now.mean.expand_as(source.mean), now.var.expand_as(source.var))


def _take_in(stream: Stream, source: Moments, batch: Moments, num_images: int, eps: float, call: NormCall) -> None:
    """Let a stream take in a batch, [C], unless it leads back to the source, [1, C]; a jump begins the stream anew."""
    seen = _as_row(batch, source)
    to_source = _measure_divergence(seen, source, eps)
    to_now = _measure_divergence(seen, _read_stream(stream, source, eps, call), eps)
    if to_source < STREAM_RETURN * to_now:
        stream.begin_anew()
        return

    if stream.moments is not None and _measure_shift(_as_row(stream.moments, source), seen, eps) > STREAM_JUMP:
        stream.begin_anew()
    stream.take_in(batch, num_images)


def _read_stream(stream: Stream, source: Moments, eps: float, call: NormCall) -> Moments:
    """The statistics that a stream has come to, [1, C]."""
    if stream.moments is None:
        return source

    near = keep_near(_as_row(stream.moments, source), source, STREAM_BOUND, eps)
    return _blend_moments(source, near, call.spec.source_images, eps, stream.number)


def _as_row(moments: Moments, like: Moments) -> Moments:
    """Moments [C] as [1, C], of the type and on the device of others."""
    return Moments(*(field.to(like.mean).unsqueeze(0) for field in moments))


@contextlib.contextmanager
def applying_rule(model: nn.Module, unseen: Unseen, **answers: object) -> Iterator[None]:
    """In this scope all norms of a model that have domains apply another rule; a stream begins anew in it.

    Args:
        model: with norms of bnext.
        unseen: the rule, see `NormSpec`.
        answers: other fields of `NormSpec`: source_images, fallback_domain.

    Raises:
        ConfigError: the rule does not go with the answers.

    Example:
        >>> with applying_rule(nn.Sequential(), "mixture"):
        ...     pass
    """
    specs: dict[nn.Module, Any] = {module: getattr(module, "spec", None) for module in model.modules()}
    norms = [module for module, spec in specs.items() if isinstance(spec, NormSpec) and spec.domains]
    with beginning_streams(model), answering(norms, unseen=unseen, **answers):
        yield


@contextlib.contextmanager
def beginning_streams(model: nn.Module) -> Iterator[None]:
    """In this scope the stream of every norm of a model begins anew; then those before it go on."""
    streams = {module: _streams.pop(module) for module in model.modules() if module in _streams}
    try:
        yield
    finally:
        forget_stream(model)
        _streams.update(streams)


def forget_stream(model: nn.Module) -> None:
    """Let the stream of every norm of a model begin anew, at the mixture of its domains."""
    for module in model.modules():
        _streams.pop(module, None)

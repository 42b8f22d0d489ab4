"""Mini-batches as the norms of a model see them in a forward: how far from the moving average, how large, how mixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnext.distributed import get_world_size, resolve_group
from bnext.functional import (
    Moments,
    divide_parts,
    group_moments,
    group_samples,
    make_index,
    merge_moments,
    part_moments,
)
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.ownership import Sources
from bnext.scope.record import CallRecord, get_record

__all__ = ["MiniBatch", "describe_mini_batch", "observing_mini_batches"]


class MiniBatch:
    """All calls of one norm in one forward.

    Attributes:
        parts: moments of each part of each call: of the levels or domains, of the groups of a Ghost BN or a deal.
        distances: of each call, see `describe_mini_batch`.
        sizes: of each call, samples that are normalized together.
    """

    def __init__(self) -> None:
        self.parts: list[Moments] = []
        self.distances: list[Tensor] = []
        self.sizes: list[Tensor] = []


def describe_mini_batch(seen: MiniBatch) -> dict[str, Tensor]:
    """Numbers of one norm, without waiting for the device; means over channels.

        mean_distance:             |mean_b - running_mean| / sqrt(running_var + eps)
        var_ratio:                 max(q, 1 / q),  q = (var_b + eps) / (running_var + eps); their geometric mean
        normalization_batch_size:  samples that are normalized together, over all workers that share a mini-batch
        between_groups:            the variance of the groups' means / the variance of all

    Groups are the levels, domains, or groups of samples that a norm keeps apart, and the calls of a norm that is called
    several times in a forward, as that of a shared head. Running statistics are those from before the mini-batch, whose
    variance has correction 1.

    Args:
        seen: of `observing_mini_batches`.

    Returns:
        Those that there are: a norm without running statistics has no distance, one with a single group no share, one
        that population statistics normalize no normalization batch.
    """
    numbers: dict[str, Tensor] = {}
    if seen.distances:
        distance, log_ratio = torch.stack(seen.distances).mean(0)
        numbers["mean_distance"], numbers["var_ratio"] = distance, log_ratio.exp()
    if seen.sizes:
        numbers["normalization_batch_size"] = torch.stack(seen.sizes).mean()

    parts = Moments(*(torch.cat(fields) for fields in zip(*seen.parts, strict=True))) if seen.parts else None
    if parts is not None and len(parts.count) > 1:
        total = merge_moments(parts)
        between = merge_moments(parts._replace(var=torch.zeros_like(parts.var))).var
        tiny = torch.finfo(total.var.dtype).tiny
        numbers["between_groups"] = (between / total.var.clamp(min=tiny)).mean()
    return numbers


@contextlib.contextmanager
def observing_mini_batches(norms: Mapping[str, nn.Module]) -> Iterator[dict[str, MiniBatch]]:
    """Note in this scope what reaches the norms; outputs, statistics and random numbers are as without it.

    Args:
        norms: path -> batch norm of bnext or torch. Features other than [N, C, H, W] are passed over.

    Returns:
        path -> what was seen, filled while the model runs.
    """
    seen: dict[str, MiniBatch] = {}

    def see(path: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        features = list(given.values()) if isinstance(given, Mapping) else [given]
        usual = [feature for feature in features if isinstance(feature, Tensor) and feature.dim() == 4]
        if len(usual) < len(features) or not sum(feature.numel() for feature in usual):
            return

        with torch.no_grad():
            _observe(norm, given, seen.setdefault(path, MiniBatch()))

    with contextlib.ExitStack() as hooks:
        for path, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(partial(see, path), with_kwargs=True))
        yield seen


def _observe(norm: Any, given: Any, seen: MiniBatch) -> None:
    if isinstance(norm, BatchNorm2d):
        _observe_ours(norm, given, seen)
        return

    moments = part_moments([given], [0], 1)
    seen.parts.append(moments)
    if norm.running_mean is not None:
        running = Moments(moments.count, norm.running_mean[None], norm.running_var[None])
        seen.distances.append(_measure_distance(moments, running, norm.eps))
    if norm.training:
        num_workers = 1
        if isinstance(norm, nn.SyncBatchNorm):
            num_workers = get_world_size(norm.process_group)
        seen.sizes.append(moments.mean.new_tensor(float(len(given) * num_workers)))


def _observe_ours(norm: BatchNorm2d, given: Any, seen: MiniBatch) -> None:
    record = get_record()
    features, sources = norm.list_features(given, record.domain)
    names = norm.name_sources(sources)

    spec, groups = norm.spec, record.groups.get(norm)
    size = spec.normalization_batch_size if norm.uses_mini_batch else None
    counts = tuple(len(feature) for feature in features)
    grouping = group_samples(counts, tuple(sources), norm.number_mini_batches(spec, names), size)
    if groups is not None and len(features) == 1 and len(groups.numbers) == len(features[0]):
        grouping = divide_parts(grouping, groups)

    device = features[0].device
    parts = [make_index(part, device) if isinstance(part, tuple) else part for part in grouping.parts]
    moments = part_moments(features, parts, len(grouping.sources))
    is_seen = make_index(_find_present(grouping.sources, sources), device)
    seen.parts.append(Moments(*(field[is_seen] for field in moments)))

    if norm.has_population:
        by_source = group_moments(moments, make_index(grouping.sources, device), len(names))
        seen.distances.append(_measure_distance(by_source, norm.stack_populations(names), norm.eps))
    if norm.uses_mini_batch:
        seen.sizes.append(_count_together(norm, features, record).to(moments.mean))


def _find_present(of_parts: tuple[int, ...], sources: list[Sources]) -> tuple[int, ...]:
    """The parts whose source is in the call."""
    present: set[int] = set()
    for source in sources:
        present.update((source,) if isinstance(source, int) else source)
    return tuple(index for index, source in enumerate(of_parts) if source in present)


def _measure_distance(moments: Moments, running: Moments, eps: float) -> Tensor:
    """Distance of means and logarithm of the ratio of variances, [2]: over channels, and domains with elements."""
    scale = running.var + eps
    distance = (moments.mean - running.mean).abs() / scale.sqrt()
    log_ratio = ((moments.unbiased_var() + eps) / scale).log().abs()

    weight = (moments.count > 1).to(distance.dtype).unsqueeze(-1)
    total = (weight.sum() * distance.shape[-1]).clamp(min=1)
    return torch.stack([(weight * distance).sum() / total, (weight * log_ratio).sum() / total])


def _count_together(norm: BatchNorm2d, features: list[Tensor], record: CallRecord) -> Tensor:
    """Samples of a feature that are normalized together, over all workers; virtual ones by their elements."""
    groups, virtual = record.groups.get(norm), record.virtual.get(norm)
    feature: Any = max(features, key=len)
    workers = resolve_group(norm.spec.workers) if norm.training else None
    number = float(len(feature) * (1 if workers is None else workers.size()))

    size = norm.spec.normalization_batch_size if norm.training else None
    if groups is not None:
        number /= groups.num_groups
    elif size is not None:
        number /= -(-len(feature) // size)

    together = torch.tensor(number, dtype=torch.float64)
    for moments in (virtual or {}).values():
        together = together.to(moments.count.device) + moments.count / max(feature[0, 0].numel(), 1)
    return together

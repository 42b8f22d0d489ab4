"""Population statistics of the levels of a trained head: measured, merged, mixed, compared, and written into its norms.

Shape letters: C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from bnext.checkpoints import load_model
from bnext.evaluation.reestimate import is_level_norm
from bnext.functional import Moments, batch_moments, merge_moments, stack_parts, standard_errors
from bnext.functional.standard_errors import merge_spreads, spread_of_batch
from bnext.heads.statistics import forward_statistics
from bnext.layers import LevelBatchNorm2d
from bnext.layers.walk import find_norms
from bnext.scope.model import restoring

__all__ = [
    "Populations",
    "find_level_norms",
    "load_with_levels",
    "measure_distances",
    "measure_errors",
    "measure_levels",
    "merge_batches",
    "merge_levels",
    "mix_populations",
    "read_populations",
    "remembering_features",
    "write_populations",
]

# Path of a norm -> level -> moments, [C] and in float64.
Populations = dict[str, dict[str, Moments]]


class Distance(NamedTuple):
    """Distance of a level from a population, mean over channels.

    Args:
        mean: |difference of means|, in standard deviations of the level.
        ratio: |log of the ratio of standard deviations|.
    """

    mean: float
    ratio: float


def load_with_levels(cfg: CfgNode, weights: str) -> nn.Module:
    """The model of a checkpoint, in evaluation mode, with a population for each level, whatever it was trained with."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BNEXT.RETINANET.POPULATION = "per_level"
    cfg.MODEL.BNEXT.RETINANET.LEVEL_GROUPS = []
    return load_model(cfg, weights)


def find_level_norms(model: nn.Module) -> dict[str, LevelBatchNorm2d]:
    """Path -> norm of the head that sees levels."""
    return find_norms(model, is_level_norm)  # type: ignore[return-value]


# ---- measuring


def measure_levels(model: Any, batches: Iterable[Any]) -> list[Populations]:
    """Moments of each level before every norm of the head, for each batch: what a re-estimation sees.

    The norms of the head normalize by their mini-batches, as in training; the rest of the model is in evaluation mode.

    Args:
        model: a RetinaNet as it was trained; it is as it was afterwards.
        batches: of records.
    """
    norms = find_level_norms(model)
    measured: list[Populations] = []

    def see(path: str, features: Mapping[str, Tensor]) -> None:
        measured[-1][path] = {level: batch_moments(feature.double()) for level, feature in features.items()}

    with torch.no_grad(), restoring(model), contextlib.ExitStack() as hooks:
        model.eval()
        for path, norm in norms.items():
            norm.train()
            hooks.enter_context(
                norm.register_forward_pre_hook(lambda _, inputs, path=path: see(path, inputs[0]))  # type: ignore[misc]
            )

        for batch in batches:
            measured.append({})
            forward_statistics(model, batch)
    return measured


def merge_batches(measured: Sequence[Populations]) -> Populations:
    """The populations of all batches together."""
    merged: Populations = {}
    for path, by_level in measured[0].items():
        merged[path] = {level: _merge([batch[path][level] for batch in measured]) for level in by_level}
    return merged


def measure_errors(measured: Sequence[Populations]) -> dict[str, float]:
    """Level -> standard error of its mean, in standard deviations: mean over channels and norms. Needs two batches."""
    populations = merge_batches(measured)

    errors: dict[str, list[float]] = {}
    for path, by_level in populations.items():
        for level, total in by_level.items():
            spreads = [spread_of_batch(batch[path][level]) for batch in measured]
            error, _ = standard_errors(merge_spreads(stack_parts(spreads)), total)
            errors.setdefault(level, []).append(float((error / total.var.sqrt()).mean()))
    return {level: sum(values) / len(values) for level, values in errors.items()}


# ---- other populations of the same levels


def merge_levels(populations: Populations, groups: Sequence[Sequence[str]]) -> Populations:
    """Populations of groups of levels: each level has that of its group. Elements count alike, as in a mini-batch.

    Args:
        populations: of every level.
        groups: levels that go together; one in no group keeps its own.
    """
    merged: Populations = {}
    for path, by_level in populations.items():
        merged[path] = dict(by_level)
        for group in groups:
            merged[path].update(dict.fromkeys(group, _merge([by_level[level] for level in group])))
    return merged


def mix_populations(one: Populations, other: Populations, share: float) -> Populations:
    """Means and variances between two populations, in proportion: share 0 is `one`, 1 the other."""
    mixed: Populations = {}
    for path, by_level in one.items():
        mixed[path] = {}
        for level, moments in by_level.items():
            mean = torch.lerp(moments.mean, other[path][level].mean, share)
            var = torch.lerp(moments.var, other[path][level].var, share)
            mixed[path][level] = Moments(moments.count, mean, var)
    return mixed


def measure_distances(populations: Populations, others: Populations) -> dict[str, dict[str, Distance]]:
    """Path -> level -> how far its population is from the other one."""
    distances: dict[str, dict[str, Distance]] = {}
    for path, by_level in populations.items():
        distances[path] = {}
        for level, moments in by_level.items():
            other = others[path][level]
            mean = (moments.mean - other.mean).abs() / moments.var.sqrt()
            ratio = (moments.var / other.var).log().abs() / 2
            distances[path][level] = Distance(float(mean.mean()), float(ratio.mean()))
    return distances


def _merge(parts: Sequence[Moments]) -> Moments:
    return merge_moments(stack_parts(parts))


# ---- of a model


def read_populations(model: nn.Module) -> Populations:
    """The populations that normalize each level now; their counts are unknown, and infinite."""
    populations: Populations = {}
    for path, norm in find_level_norms(model).items():
        populations[path] = {}
        for level in norm.levels:
            state: Any = norm.population_state(level)
            mean, var = state.running_mean.double().clone(), state.running_var.double().clone()
            populations[path][level] = Moments(mean.new_tensor(float("inf")), mean, var)
    return populations


@torch.no_grad()
def write_populations(model: nn.Module, populations: Populations) -> None:
    """Let populations normalize the levels of a model that has one for each; see `load_with_levels`."""
    norms = find_level_norms(model)
    for path, by_level in populations.items():
        for level, moments in by_level.items():
            state: Any = norms[path].population_state(level)
            state.running_mean.copy_(moments.mean)
            state.running_var.copy_(moments.var)


@contextlib.contextmanager
def remembering_features(model: Any) -> Iterator[None]:
    """In this scope the backbone of a model, in evaluation mode, runs once for every batch of images.

    Of models that differ in their head alone. What it gives is kept by the images' bytes.
    """
    backbone = model.backbone
    forward = backbone.forward
    known: dict[bytes, Any] = {}

    def look_up(images: Tensor) -> Any:
        key = images.numpy().tobytes()
        if key not in known:
            known[key] = forward(images)
        return known[key]

    backbone.forward = look_up
    try:
        yield
    finally:
        del backbone.forward

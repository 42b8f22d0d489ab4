"""The kinds of statistics that a trained model can be evaluated with, and how it is put into one.

A new kind is a new row of `KINDS`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bnext.errors import StatisticsError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from bnext.layers.sources import add_levels, is_per_level
from bnext.layers.walk import find_bnext_norms
from bnext.scope.model import restoring
from bnext.statistics import RecomputeReport
from bnext.statistics.mini_batch_inference import normalizing_evaluation_by_mini_batch
from bnext.statistics.observe import select_norms
from bnext.surgery import convert_norm

__all__ = [
    "KINDS",
    "Kind",
    "Recompute",
    "count_images_as_trained",
    "find_obstacle",
    "normalizing_evaluation_by_mini_batch",
    "use_kind",
]

Recompute = Callable[..., RecomputeReport]
Source = Literal["file", "mini_batch", "training", "domain", "test"]


@dataclass(frozen=True)
class Kind:
    """Statistics that normalize at inference.

    Args:
        name: of the kind.
        words: the same in a table.
        source: whence they are: the file, the mini-batches of the evaluation, or a re-estimation on images of the
            training, of the domain that is evaluated, or of the test.
        better, worse, equal: a sentence that says what it means if they are better than those of the file; {0} is the
            difference.
        estimator: of the re-estimation.
        population: of norms that see several levels, where a kind needs another one.
        is_as_trained: whether as many images are to be evaluated together as training normalizes together; else one.
        obstacle: called as obstacle(model, num_images), why the kind does not apply to a model that has norms to
            re-estimate; None: it does.
    """

    name: str
    words: str
    source: Source
    better: str = ""
    worse: str = ""
    equal: str = ""
    estimator: str = "pooled"
    population: str | None = None
    is_as_trained: bool = False
    obstacle: Callable[[nn.Module, int], str | None] = lambda model, num_images: None


def count_images_as_trained(model: nn.Module, num_images: int) -> dict[int, str]:
    """Images of a worker that are normalized together in training.

    Args:
        model: the detector. Norms under `roi_heads` count RoIs, not images, and are left out.
        num_images: of a worker in an SGD step.

    Returns:
        Number -> the first norm that it is of; more than one number, where norms differ. `num_images`, unless
        normalization_batch_size cuts them into groups, whose sizes then differ by at most one: the largest group.

    Raises:
        StatisticsError: the model has no norm with population statistics that are not frozen.
    """
    counts: dict[int, str] = {}

    for path, norm in select_norms(model).items():
        if path.startswith("roi_heads."):
            continue
        limit = norm.spec.normalization_batch_size if isinstance(norm, BatchNorm2d) else None
        num_groups = 1 if limit is None else -(-num_images // limit)
        counts.setdefault(-(-num_images // num_groups), path)

    return counts or {num_images: ""}


def _find_unequal_counts(model: nn.Module, num_images: int) -> str | None:
    counts = count_images_as_trained(model, num_images)
    if len(counts) == 1:
        return None

    differing = " and ".join(f"{count} in {path}" for count, path in counts.items())
    return f"norms differ in how many images they normalize together in training: {differing}"


def _give_levels(model: nn.Module) -> None:
    """A population for each level, in the norms of bnext that see several."""
    norms = {path: norm.spec for path, norm in find_bnext_norms(model).items() if isinstance(norm, LevelBatchNorm2d)}
    convert_norm(model, {path: spec.replace(population=add_levels(spec.population)) for path, spec in norms.items()})


def _find_no_levels(model: nn.Module, num_images: int) -> str | None:
    levels = [norm for norm in select_norms(model).values() if isinstance(norm, LevelBatchNorm2d)]

    if not levels:
        return "the model has no batch norm that sees several levels"
    if all(is_per_level(norm.spec.population) for norm in levels):
        return "the statistics are per level already, see the precise ones"
    return None


_ROWS = (
    Kind("moving_average", "moving average, as in the file", "file"),
    Kind(
        "precise",
        "precise, pooled",
        "training",
        better="precise statistics are worth {0} AP: the moving average does not fit",
        worse="precise statistics cost {0} AP: the moving average fits better",
        equal="precise statistics change nothing ({0} AP): the moving average fits",
    ),
    Kind(
        "mean_of_batches",
        "precise, mean of batches",
        "training",
        better="the mean of the batches' variances is worth {0} AP: the moving average does not fit",
        worse="the mean of the batches' variances costs {0} AP",
        equal="the mean of the batches' variances changes nothing ({0} AP)",
        estimator="mean_of_batches",
    ),
    Kind(
        "mini_batch",
        "mini-batch at inference: each image",
        "mini_batch",
        better="each image's own statistics are worth {0} AP: the population statistics do not describe what the norms "
        "see",
        worse="each image's own statistics cost {0} AP: those of one image are no substitute",
        equal="each image's own statistics change nothing ({0} AP)",
    ),
    Kind(
        "mini_batch_as_trained",
        "mini-batch at inference: as many images as in training",
        "mini_batch",
        better="normalizing as in training is worth {0} AP: training and test are inconsistent",
        worse="normalizing as in training costs {0} AP: mini-batches add noise, population statistics lose nothing",
        equal="normalizing as in training changes nothing ({0} AP): training and test are consistent",
        is_as_trained=True,
        obstacle=_find_unequal_counts,
    ),
    Kind(
        "per_level",
        "re-estimated per level",
        "training",
        better="statistics of each level are worth {0} AP: levels differ from one another",
        worse="statistics of each level cost {0} AP: the model wants those of all levels together",
        equal="statistics of each level change nothing ({0} AP)",
        population="per_level",
        obstacle=_find_no_levels,
    ),
    Kind(
        "per_domain",
        "re-estimated on the domain's own images",
        "domain",
        better="statistics of the domain's own images are worth {0} AP: its features are not those of all training "
        "images",
        worse="statistics of the domain's own images cost {0} AP: those of the file fit better",
        equal="statistics of the domain's own images change nothing ({0} AP)",
    ),
    Kind(
        "adaptive",
        "adaptive: of the test images",
        "test",
        better="statistics of the test images are worth {0} AP: their domain is another, or the file's do not fit",
        worse="statistics of the test images cost {0} AP: those of the file fit better",
        equal="statistics of the test images change nothing ({0} AP)",
    ),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ROWS}


def find_obstacle(model: nn.Module, kind: str, num_images: int = 1) -> str | None:
    """Why a kind of statistics does not apply to a model; None: it does.

    Args:
        model: of any kind.
        kind: one of `KINDS`.
        num_images: of a worker in an SGD step, for "mini_batch_as_trained".
    """
    if KINDS[kind].source == "file":
        return None  # whatever is in it, also GroupNorm's nothing

    try:
        select_norms(model)
    except StatisticsError:
        return "the model has no batch norm with population statistics that are not frozen"
    return KINDS[kind].obstacle(model, num_images)


@contextlib.contextmanager
def use_kind(
    model: nn.Module,
    kind: Kind,
    data: Mapping[str, Any],
    recompute: Recompute,
    give_levels: Callable[[nn.Module], object] | None = None,
) -> Iterator[tuple[nn.Module, RecomputeReport | None]]:
    """Put a model into a kind of statistics for this scope; it is as it was afterwards.

    Args:
        model: of any kind.
        kind: of `KINDS`, to which `find_obstacle` has none.
        data: source -> images, for a kind that is re-estimated.
        recompute: called as recompute(model, images, estimator=...).
        give_levels: called with a copy of the model, gives its head statistics for each level, for "per_level"; None:
            `convert_norm` does it, in a head of bnext.

    Returns:
        The model with these statistics, or a copy, where its norms have to be others; and the report of a
        re-estimation.
    """
    with restoring(model):
        if kind.source == "file":
            yield model, None

        elif kind.source == "mini_batch":
            with normalizing_evaluation_by_mini_batch(model):
                yield model, None

        else:
            variant = model
            if kind.population is not None:
                variant = copy.deepcopy(model)
                (give_levels or _give_levels)(variant)
            yield variant, recompute(variant, data[kind.source], estimator=kind.estimator)

"""Same model, which statistics? Numbers of any torch model with the statistics of its file and with others.

Users ask it in ultralytics/ultralytics#5891, open-mmlab/mmaction2#1054 and facebookresearch/maskrcnn-benchmark#1006.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from bnext.distributed import resolve_group
from bnext.distributed.collectives import all_gather_objects
from bnext.errors import ConfigError, DatasetError, StatisticsError, check_choice
from bnext.layers.shuffled import shares_work
from bnext.repair.kinds import KINDS, Kind, Recompute, find_obstacle, use_kind
from bnext.scope.model import restoring
from bnext.statistics import recompute_population_statistics

__all__ = ["FAILURES", "can_go_on", "compare_kinds", "failing_alone"]

Numbers = Mapping[str, float | None]
FAILURES = (ValueError, FloatingPointError)  # ours; of detectron2's proposals, if boxes are not finite


def compare_kinds(
    model: nn.Module,
    data: Mapping[str, Any],
    measure: Callable[[nn.Module, Kind], Numbers],
    kinds: Sequence[str] = tuple(KINDS),
    *,
    num_images: int = 1,
    recompute: Recompute = recompute_population_statistics,
    obstacles: Mapping[str, str] | None = None,
    give_levels: Callable[[nn.Module], object] | None = None,
    on_kind: Callable[[Kind, dict[str, Any]], object] = lambda kind, results: None,
) -> dict[str, Any]:
    """Measure a model with several kinds of statistics.

    Args:
        model: of any kind; as it was afterwards.
        data: source -> batches to re-estimate on: "training", "test" (without labels), and "domain". A kind without its
            source does not apply.
        measure: called as measure(model, kind), evaluates it and gives numbers by name. By `kind.is_as_trained` it
            knows how many images to evaluate together, where mini-batches normalize.
        kinds: names of `KINDS`, each of which is measured once.
        num_images: of a worker in an SGD step.
        recompute: called as recompute(model, data[source], estimator=...).
        obstacles: kind -> why it is not to be measured, beside those that the model has.
        give_levels: see `use_kind`; with it "per_level" applies.
        on_kind: called with a kind and what is measured so far, on every worker.

    Returns:
        {"rows": {kind: numbers}, "reports": {kind: of its re-estimation}, "not_applicable": {kind: why}}. A kind that
        fails, as activations are not finite or a mini-batch has one element, does not apply; its message says why.

    Raises:
        ConfigError: an unknown kind; none applies.
        StatisticsError: every kind has failed.
        DatasetError: of `data` or `measure`, from whichever kind.

    Note:
        A collective: a kind that fails on one worker fails on all.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        >>> images = torch.randn(8, 3, 6, 6) + 1
        >>> def measure(model, kind):
        ...     return {"mean": model(images).mean().item()}
        >>> rows = compare_kinds(model, {"training": [images]}, measure, ["moving_average", "precise"])["rows"]
        >>> round(abs(rows["precise"]["mean"]), 4)
        0.0

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, sections 3, 4 and 5.
    """
    for name in kinds:
        check_choice("kinds", name, tuple(KINDS), where="compare_statistics")
    chosen = [KINDS[name] for name in dict.fromkeys(kinds)]

    not_applicable = {}
    for kind in chosen:
        reason = (obstacles or {}).get(kind.name, "")
        if not reason and not (kind.name == "per_level" and give_levels is not None):
            reason = find_obstacle(model, kind.name, num_images) or ""
        if not reason and kind.source not in ("file", "mini_batch", *data):
            reason = f"there are no images of the {kind.source}"
        if reason:
            not_applicable[kind.name] = reason

    applicable = [kind for kind in chosen if kind.name not in not_applicable]
    if not applicable:
        got = ": ".join(next(iter(not_applicable.items())))
        raise ConfigError.of("kinds", "hold one that applies to the model", got=got, remedy="Choose others.")

    results: dict[str, Any] = {"rows": {}, "reports": {}, "not_applicable": not_applicable}
    for kind in applicable:
        with (
            failing_alone(model, (DatasetError,)) as failures,  # a picture that is gone says nothing of a kind
            use_kind(model, kind, data, recompute, give_levels) as (variant, report),
        ):
            if report is not None:
                results["reports"][kind.name] = report.as_dict()
            numbers = measure(variant, kind)

        if failures:
            not_applicable[kind.name] = failures[0]
        else:
            results["rows"][kind.name] = numbers
        on_kind(kind, results)

    if not results["rows"]:
        first = applicable[0].name
        got = f"{first}: {not_applicable[first]}"
        raise StatisticsError.of(
            "kinds", "hold one that can be evaluated", got=got, remedy="Mend that first, or choose others."
        )
    return results


@contextlib.contextmanager
def failing_alone(model: nn.Module, raised: tuple[type[Exception], ...] = ()) -> Iterator[list[str]]:
    """A scope whose failure is no exception, where no other worker waits for this one: it gives the failures' reasons.

    They are there at the end of the scope, those of all workers on each of them. A collective.

    Args:
        model: that is used in the scope.
        raised: errors that are exceptions all the same.
    """
    failures: list[str] = []
    reason = ""

    try:
        yield failures
    except FAILURES as error:
        if isinstance(error, raised) or not can_go_on(model):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__

    every = all_gather_objects(reason, resolve_group("all"), "compare_statistics")
    failures += [reason for reason in every if reason]


def can_go_on(model: nn.Module) -> bool:
    """Whether no other worker can wait for this one in a layer, when it has failed."""
    with restoring(model):
        return not shares_work(model.train())

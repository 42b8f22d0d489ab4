"""The table of kinds of statistics for any torch model: what each of them is worth, by numbers of the caller's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bnext.errors import ConfigError, Refusal, StatisticsError
from bnext.files import drop_nan
from bnext.layers.forms import TreatAs
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.numbers import is_number
from bnext.repair.compare import compare_kinds
from bnext.repair.kinds import KINDS, Kind
from bnext.repair.levels import find_levels, give_levels, has_levels
from bnext.repair.observe_calls import NUM_OBSERVED, peek
from bnext.scope.forward import count_levels
from bnext.scope.model import restoring
from bnext.statistics import RecomputeReport, recompute_population_statistics
from bnext.statistics.arguments import check_data
from bnext.statistics.data_pass import Forward
from bnext.tables import format_rows

__all__ = ["Comparison", "compare_statistics"]

_WHERE = "compare_statistics"
_KINDS = ("moving_average", "precise", "mean_of_batches", "mini_batch", "per_level", "adaptive")
_WORDS = {
    "moving_average": "moving average, as it is",
    "mini_batch": "mini-batch at inference, as evaluate batches it",
}
_PER_LEVEL = "the statistics are per level already, see the precise ones"

NO_NUMBERS = Refusal(
    StatisticsError,
    "evaluate",
    "return numbers by name",
    "Return a dict, such as {{'accuracy': 0.71}}; None stands for a number that there is not.",
)
OTHER_MODEL = Refusal(
    StatisticsError,
    "evaluate",
    "run the model that it is called with, which may be a copy",
    "Write def evaluate(model): ... and use that model; norms of levels are in it alone.",
)
ONE_PASS = Refusal(
    StatisticsError,
    "{name}",
    "be a list or a loader that can be gone through again",
    "Make a list of its batches: each kind of statistics needs them.",
)
OTHER_KIND = Refusal(
    ConfigError, "kinds", "be some of {kinds}", "Choose among them; those of a detector are in bnext compare."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Numbers of one model with several kinds of statistics. `print` shows the table.

    Args:
        rows: kind -> name of a number -> number, or None; "moving_average" is the model as it is.
        not_applicable: kind that was asked for -> why there is no row of it.
        reports: kind -> of its re-estimation.
    """

    rows: Mapping[str, Mapping[str, float | None]]
    not_applicable: Mapping[str, str]
    reports: Mapping[str, Any]

    @property
    def differences(self) -> dict[str, dict[str, float | None]]:
        """Kind -> name of a number -> its difference to that of the moving average, where both are there."""
        base = self.rows.get("moving_average", {})
        differences: dict[str, dict[str, float | None]] = {}

        for kind, row in self.rows.items():
            differences[kind] = {}
            for name, value in row.items():
                before = base.get(name)
                differences[kind][name] = None if value is None or before is None else value - before
        return differences

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is null."""
        return dict(drop_nan({**dataclasses.asdict(self), "differences": self.differences}))

    def __str__(self) -> str:
        names: dict[str, None] = {}
        for row in self.rows.values():
            names |= dict.fromkeys(row)

        lines = []
        for kind, row in self.rows.items():
            cells = [_WORDS.get(kind, KINDS[kind].words)]
            for name in names:
                value, change = row.get(name), self.differences[kind].get(name)
                cells.append("" if value is None else f"{value:.4g}")
                cells.append("" if change is None or kind == "moving_average" else f"{change:+.3g}")
            lines.append(cells)

        headers = ["statistics"]
        for name in names:
            headers += [name, "change"]
        left = [f"{kind} does not apply: {reason}." for kind, reason in self.not_applicable.items()]
        return "\n".join([format_rows(lines, headers), *([""] if left else []), *left])


def compare_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    evaluate: Callable[[nn.Module], Mapping[str, float | None]],
    kinds: Sequence[str] = _KINDS,
    *,
    test_loader: Iterable[Any] | None = None,
    levels: Sequence[str] | None = None,
    entry: str | Sequence[str] = "forward",
    forward: Forward | None = None,
    num_batches: int | None = None,
    num_samples: int | None = None,
    seed: int | None = 0,
    treat_as: TreatAs | None = None,
) -> Comparison:
    """Evaluate a model with the statistics that it has, and with others: would a repair be worth it?

    Args:
        model: any torch model, of torchvision or Lightning, say; bitwise as it was afterwards.
        loader: batches of the training, see `recompute_population_statistics`; gone through once for each kind.
        evaluate: called with the model, or a copy of it, in evaluation mode, without gradients; gives numbers by name.
        kinds: "moving_average", the model as it is; re-estimated: "precise", "mean_of_batches", "per_level" (for a head
            that is called on several levels, see `bnext.repair`), "adaptive" (on `test_loader`); or "mini_batch": each
            batch of `evaluate` is normalized by its own statistics.
        test_loader: batches of the images that are evaluated, for "adaptive".
        levels, entry, treat_as: see `bnext.repair`.
        forward, num_batches, num_samples, seed: see `recompute_population_statistics`.

    Returns:
        The table: print it, or read `rows` and `differences`.

    Raises:
        ConfigError: an unknown kind, or none applies.
        StatisticsError: data that can be gone through but once; `evaluate` gives no numbers; every kind fails.

    Note:
        A collective where there are several workers; `evaluate` is called on each of them.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        >>> images = torch.randn(8, 3, 6, 6) + 1
        >>> table = compare_statistics(model, [images], lambda model: {"mean": float(model(images).mean())})
        >>> round(abs(table.rows["precise"]["mean"]), 4)
        0.0

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, sections 3, 4 and 5.
    """
    if isinstance(kinds, str) or not kinds:
        raise OTHER_KIND.of(repr(kinds), _WHERE, kinds=", ".join(_KINDS))
    for kind in kinds:
        if kind not in _KINDS:
            raise OTHER_KIND.of(repr(kind), _WHERE, kinds=", ".join(_KINDS))
    data = {"training": loader} if test_loader is None else {"training": loader, "test": test_loader}
    for name, batches in (("loader", loader), ("test_loader", test_loader)):
        if batches is not None:
            check_data(batches, _WHERE, name)
        if hasattr(batches, "__next__"):
            raise ONE_PASS.of(f"an iterator ({type(batches).__name__})", _WHERE, name=name)

    def recompute(model: nn.Module, batches: Iterable[Any], *, estimator: Any) -> RecomputeReport:
        return recompute_population_statistics(
            model,
            batches,
            estimator=estimator,
            forward=forward,
            num_batches=num_batches,
            num_samples=num_samples,
            seed=seed,
            progress=True,
        )

    counted = count_levels(model, entry)
    try:
        with restoring(model):
            options = {"levels": levels, "forward": forward, "treat_as": treat_as}
            give, obstacle = _plan_levels(model, loader, options) if "per_level" in kinds else (None, "")
            results = compare_kinds(
                model,
                data,
                partial(_measure, evaluate, model),
                kinds,
                recompute=recompute,
                obstacles={"per_level": obstacle},
                give_levels=give,
            )
    except _NoNumbers as error:
        raise NO_NUMBERS.of(str(error), _WHERE) from None
    finally:
        counted.remove()
    return Comparison(results["rows"], results["not_applicable"], results["reports"])


def _plan_levels(
    model: nn.Module, loader: Iterable[Any], options: Mapping[str, Any]
) -> tuple[Callable[[nn.Module], object] | None, str]:
    """The function that gives a copy of the model statistics for each level; or why there is none."""
    first, _ = peek(loader, NUM_OBSERVED)
    try:
        plan = find_levels(model, first, **options)
    except StatisticsError as error:
        return None, str(error).rstrip(".")

    if all(has_levels(model.get_submodule(path), norm) for path, norm in plan.norms.items()):
        return None, _PER_LEVEL
    return partial(give_levels, plan=plan, treat_as=options["treat_as"]), ""


class _NoNumbers(Exception):
    """The caller's evaluation has given something else."""


class _Calls:
    """Whether a norm of a model was called, or of a copy of it; a hook that can be pickled."""

    is_any = False

    def __call__(self, norm: nn.Module, args: Any) -> None:
        self.is_any = True

    def __deepcopy__(self, memo: Any) -> _Calls:
        return self


def _measure(
    evaluate: Callable[[nn.Module], Any], model: nn.Module, variant: nn.Module, kind: Kind
) -> dict[str, float | None]:
    """The numbers of the caller's evaluation, of the model or a copy with other norms."""
    calls = _Calls()
    with restoring(variant), torch.no_grad(), contextlib.ExitStack() as hooks:
        for norm in variant.modules() if variant is not model else ():
            if isinstance(norm, LevelBatchNorm2d):
                hooks.enter_context(norm.register_forward_pre_hook(calls))
        variant.eval()
        numbers = evaluate(variant)

    if variant is not model and not calls.is_any:
        raise OTHER_MODEL.of("no call of its head's norms", _WHERE)
    is_right = isinstance(numbers, Mapping) and len(numbers) > 0
    for name, value in numbers.items() if is_right else ():
        number = _to_number(value)  # a float may be infinite or none
        is_right &= isinstance(name, str) and (value is None or is_number(number) or isinstance(number, float))
    if not is_right:
        raise _NoNumbers(repr(numbers))
    return {name: None if value is None else float(value) for name, value in numbers.items()}


def _to_number(value: Any) -> Any:
    """A tensor of one element as its number."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value

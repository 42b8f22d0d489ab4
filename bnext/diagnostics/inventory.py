"""The norms of any torch model: what each answers to the question "which batch?", and one line for those that agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnext.diagnostics.fold_paths import fold_paths
from bnext.distributed import get_world_size, resolve_group
from bnext.errors import list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.forms import find_forms, find_other_norms
from bnext.layers.norm_form import NormForm
from bnext.layers.spec import Workers
from bnext.tables import format_rows

__all__ = [
    "NormGroup",
    "NormRecord",
    "find_norm_groups",
    "find_norm_records",
    "format_affine",
    "format_mini_batch",
    "format_norm_groups",
    "format_population",
    "format_range",
    "group_norms",
]

Samples = int | Callable[[str], int | None] | None


@dataclasses.dataclass(frozen=True)
class NormRecord:
    """One norm of a model.

    Args:
        path: its first place in the model.
        kind: class.
        num_features: channels; 0: not known.
        statistics: over what mini-batch statistics are computed: as in `NormSpec`; "sample": each sample alone; "none":
            there are none, as population statistics normalize.
        population: which population statistics are kept, as in `NormSpec`.
        affine: who owns scale and shift, likewise.
        inference: what normalizes in evaluation mode: "population", "mini_batch", "sample"; "unknown".
        training: what normalizes in training: the same words, and "renorm".
        workers: who shares a mini-batch.
        group_size: at most so many samples of a worker are normalized together (Ghost BN); None: all.
        batch_size: samples that are normalized together in training, over all workers; None: not known, or there is no
            mini-batch.
        eps: added to the variance.
        momentum: weight of the mini-batch in the running statistics; None: cumulative, or there are none.
        frozen: what no longer changes: "none", "statistics", "affine", "both".
        domains: names of the levels, domains or pairs that own a population; of all, if none does.
        num_parameters: numbers that are trained, or were before they were frozen.
    """

    path: str
    kind: str
    num_features: int
    statistics: str
    population: str
    affine: str
    inference: str
    training: str
    workers: Workers
    group_size: int | None
    batch_size: int | None
    eps: float
    momentum: float | None
    frozen: str
    domains: tuple[str, ...]
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class NormGroup:
    """Norms that are equal in all but path, channels and number of parameters, and whose paths fold into one pattern.

    Args:
        pattern: stands for all paths.
        records: of the norms, in the order of the model.
    """

    pattern: str
    records: tuple[NormRecord, ...]

    def __str__(self) -> str:
        record, number = self.records[0], len(self.records)
        channels = format_range([one.num_features for one in self.records])
        answers = (
            f"{format_mini_batch(record)}; at inference {format_population(record)}; affine {format_affine(record)}"
        )
        return f"{self.pattern or 'the model'}: {number} {record.kind}, {channels} channels, {answers}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all norms."""
        return tuple(record.path for record in self.records)

    @property
    def num_parameters(self) -> int:
        """The number of parameters of all norms together."""
        return sum(record.num_parameters for record in self.records)

    @property
    def name(self) -> str:
        """The pattern in letters that names of metrics may have."""
        return self.pattern.replace("{", "").replace("}", "").replace(",", "_") or "norm"


def find_norm_records(model: nn.Module, num_samples: Samples = None) -> list[NormRecord]:
    """A record of every norm of a model, in the order of its modules; of one at several places once.

    Args:
        model: any module. Norms of torch that are in evaluation mode within a model in training mode count as frozen.
        num_samples: samples of a worker that reach a norm in one call; called as num_samples(path), or for all norms.
            None: not known.

    Note:
        Nothing is run and nothing is changed.
    """
    norms: dict[nn.Module, tuple[str, NormForm | None]] = {}
    for path, norm, form in find_forms(model):
        norms.setdefault(norm, (path, form))
    for path, (norm, _) in find_other_norms(model).items():
        norms.setdefault(norm, (path, None))

    places = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    records = [_describe(model, path, norm, form, num_samples) for norm, (path, form) in norms.items()]
    return sorted(records, key=lambda record: places[record.path])


def find_norm_groups(model: nn.Module, num_samples: Samples = None) -> list[NormGroup]:
    """The norms of a model, those together that differ in path, channels and number of parameters alone.

    Args:
        model, num_samples: see `find_norm_records`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
        >>> [(group.pattern, len(group.records)) for group in find_norm_groups(model)]
        [('{1,3}', 2)]
    """
    return group_norms(find_norm_records(model, num_samples))


def group_norms(records: Iterable[NormRecord]) -> list[NormGroup]:
    """Groups of records, in the order of the first of each."""
    records = list(records)
    by_answers: dict[NormRecord, list[NormRecord]] = {}
    for record in records:
        blank = dataclasses.replace(record, path="", num_features=0, num_parameters=0)
        by_answers.setdefault(blank, []).append(record)

    groups: list[NormGroup] = []
    for equal in by_answers.values():
        by_path = {record.path: record for record in equal}
        for pattern, paths in fold_paths(by_path).items():
            groups.append(NormGroup(pattern, tuple(by_path[path] for path in paths)))

    order = {record.path: number for number, record in enumerate(records)}
    return sorted(groups, key=lambda group: order[group.records[0].path])


def format_norm_groups(groups: Sequence[NormGroup]) -> str:
    """A table with a line for each group: what is normalized by what, how many norms, and what no longer changes."""
    headers = ["norms", "kind", "number", "channels", "mini-batch", "at inference", "affine"]
    rows = []
    for group in groups:
        record = group.records[0]

        rows.append(
            [
                group.pattern or "the model",
                record.kind,
                str(len(group.records)),
                format_range([one.num_features for one in group.records]),
                format_mini_batch(record),
                format_population(record),
                format_affine(record),
            ]
        )

    return format_rows(rows, headers, num_texts=len(headers))


def format_affine(record: NormRecord) -> str:
    """The owner of scale and shift, and whether they still change."""
    return record.affine.replace("_", " ") + (", frozen" if record.frozen in ("affine", "both") else "")


def format_range(numbers: Sequence[int]) -> str:
    """The least and the most of some numbers.

    Example:
        >>> format_range([64, 2048, 64]), format_range([256, 256])
        ('64-2,048', '256')
    """
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def format_mini_batch(record: NormRecord) -> str:
    """The samples of a mini-batch, or why there is none."""
    if record.training == "population":
        return "frozen" if record.frozen in ("statistics", "both") else "the population's"
    if record.statistics == "sample":
        return "each sample"

    words = [] if record.training == "mini_batch" else [record.training]
    words.append(record.statistics.replace("_", " ") if record.statistics != "shared" else "all samples")
    if record.batch_size is not None:
        words[-1] += f" of {record.batch_size}"
    elif record.group_size is not None:
        words[-1] += f" in groups of {record.group_size}"
    if record.workers != "one" and record.workers != 1:
        words.append("all workers" if record.workers == "all" else f"workers {record.workers}")
    return ", ".join(words)


def format_population(record: NormRecord) -> str:
    """By whose statistics a norm normalizes in evaluation mode."""
    if record.inference != "population":
        return record.inference.replace("_", "-")
    if record.population == "shared":
        return "population"
    return f"population {record.population.replace('_', ' ')} ({list_few(record.domains, 5)})"


# ---- one norm


def _describe(model: nn.Module, path: str, norm: nn.Module, form: NormForm | None, num_samples: Samples) -> NormRecord:
    number = num_samples(path) if callable(num_samples) else num_samples
    if isinstance(norm, BatchNorm2d):
        return _describe_ours(path, norm, number)
    return _describe_foreign(model, path, norm, form, number)


def _describe_ours(path: str, norm: BatchNorm2d, number: int | None) -> NormRecord:
    spec = norm.spec
    is_by_population = spec.training == "population" or spec.has_frozen_statistics
    is_kept = spec.population != "none" and spec.average == "moving"

    return NormRecord(
        path=path,
        kind=type(norm).__name__,
        num_features=norm.num_features,
        statistics="none" if is_by_population else spec.statistics,
        population=spec.population,
        affine=spec.affine,
        inference=spec.inference,
        training="population" if is_by_population else spec.training,
        workers=spec.workers,
        group_size=spec.normalization_batch_size,
        batch_size=None if is_by_population else _count_together(norm, number),
        eps=norm.eps,
        momentum=norm.momentum if is_kept else None,
        frozen=spec.frozen,
        domains=tuple(name for names, _ in norm.populations() for name in names) or tuple(filter(None, norm.sources)),
        num_parameters=_count_parameters(norm),
    )


def _count_together(norm: BatchNorm2d, number: int | None) -> int | None:
    """Samples that a norm normalizes together: the largest group, or those of all workers that share."""
    size = norm.spec.normalization_batch_size
    if size is not None:
        return size if number is None else -(-number // -(-number // size))
    if number is None:
        return None

    group = resolve_group(norm.spec.workers)
    return number * (1 if group is None else group.size())


def _describe_foreign(model: nn.Module, path: str, norm: Any, form: NormForm | None, number: int | None) -> NormRecord:
    """A norm of another library, as far as it can be read."""
    domains = form.levels if form is not None else ()
    is_batch_norm = isinstance(norm, _BatchNorm) if form is None else form.is_batch_norm
    affine = form.affine if form else _tell(getattr(norm, "weight", None))
    population = form.population if form else _tell(getattr(norm, "running_mean", None))

    workers: Workers = "one"
    if isinstance(norm, nn.SyncBatchNorm):
        workers = "all" if norm.process_group is None else norm.process_group.size()
    is_frozen = form is not None and form.is_frozen
    is_still = population != "none" and (is_frozen or (model.training and not norm.training))
    by = "mini_batch" if is_batch_norm else "sample"
    statistics = "per_level" if domains else "shared"
    if not is_batch_norm:
        statistics = "sample"
    elif is_still:
        statistics = "none"

    together = number
    if number is not None and workers != "one":
        together = number * (get_world_size() if workers == "all" else int(workers))
    is_counted = is_batch_norm and not is_still
    parameters = list(norm.parameters())
    has_frozen_affine = affine != "none" and not any(parameter.requires_grad for parameter in parameters)

    return NormRecord(
        path=path,
        kind=type(norm).__name__,
        num_features=form.num_features if form else getattr(norm, "num_features", 0),
        statistics=statistics,
        population=population,
        affine=affine,
        inference="population" if population != "none" else by,
        training="population" if is_still else by,
        workers=workers,
        group_size=None,
        batch_size=together if is_counted else None,
        eps=float(getattr(norm, "eps", 0.0)) if form is None else form.eps,
        momentum=getattr(norm, "momentum", None) if population != "none" and not is_frozen else None,
        frozen=_join_frozen(is_still, has_frozen_affine),
        domains=domains,
        num_parameters=_count_parameters(norm),
    )


def _tell(value: object) -> str:
    return "none" if value is None else "shared"


def _join_frozen(statistics: bool, affine: bool) -> str:
    if statistics and affine:
        return "both"
    if statistics or affine:
        return "statistics" if statistics else "affine"
    return "none"


def _count_parameters(norm: nn.Module) -> int:
    """The parameters of a norm, its levels and domains; of a frozen one of detectron2, its buffers."""
    parameters = [parameter.numel() for parameter in norm.parameters() if not is_lazy(parameter)]
    affine = [buffer.numel() for name, buffer in norm.named_buffers() if name in ("weight", "bias")]
    return sum(parameters) + sum(affine)

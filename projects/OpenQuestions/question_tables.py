"""Tables of the study, from its results: one for each part."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from roi_question import CHOICES
from trained_detectors import HEADS

from bnext.studies.spread import compare, summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["average_distances", "format_results", "list_keys", "name"]

_OF_ROIS = ("as trained", *CHOICES, "mini_batch")


def format_results(results: Mapping[str, Any]) -> str:
    """The tables of the parts that the results are of; mean and standard deviation over seeds."""
    formats = {"groups": _format_groups, "levels": _format_levels, "repair": _format_repair, "rois": _format_rois}
    tables = [formats[part](results) for part in formats if part in results["trials"]]
    return "\n\n".join(tables)


def name(word: str) -> str:
    """A name of the results in words."""
    return {"per_level": "each level", "mini_batch": "mini-batch of each image"}.get(word, word.replace("_", " "))


def list_keys(results: Mapping[str, Any], part: str, path: str = "") -> list[str]:
    """Names under a path in the numbers of a part, in their order."""
    numbers: Any = next(iter(results["trials"][part].values()))
    for key in filter(None, path.split("/")):
        numbers = numbers[int(key)] if isinstance(numbers, list) else numbers[key]
    return list(numbers)


def average_distances(results: Mapping[str, Any], training: str, depth: int, level: str) -> list[float]:
    """Distance of a level's mean from the shared population, mean over the towers' norms of a depth, for each seed."""
    paths = list_keys(results, "levels", f"{training}/distances")
    towers: dict[str, list[str]] = {}
    for path in paths:
        towers.setdefault(path.rpartition(".")[0], []).append(path)

    columns = []
    for of_tower in towers.values():
        columns.append(collect(results, "levels", f"{training}/distances/{of_tower[depth]}/{level}/mean"))
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def _format_groups(results: Mapping[str, Any]) -> str:
    tested = ["as trained", *HEADS]
    rows = []
    for training in HEADS:
        aps = [summarize(collect(results, "groups", f"{training}/{test}/AP")) for test in tested]
        rows.append([name(training), *map(str, aps)])
    table = format_rows(rows, ["mini-batches of", *(f"population: {name(test)}" for test in tested)], num_texts=1)

    rows = []
    first = collect(results, "groups", "shared/shared/AP")
    for training in HEADS[1:]:
        difference = compare(collect(results, "groups", f"{training}/{training}/AP"), first)
        beyond = "yes" if difference.is_beyond else "no"
        rows.append([name(training), difference.show(sign="+"), beyond])
    headers = ["consistent heads", "AP against shared", "beyond two spreads"]
    return f"{table}\n\n{format_rows(rows, headers, num_texts=1)}"


def _format_levels(results: Mapping[str, Any]) -> str:
    tables = []
    for kind, header in (
        ("shares", "share of the way to each level's population"),
        ("depths", "norms of each tower with each level's population, from the input"),
        ("levels", "level with its population"),
    ):
        rows = []
        for key in list_keys(results, "levels", f"shared/{kind}"):
            cells = []
            for training in ("shared", "per_level"):
                sizes = [collect(results, "levels", f"{training}/{kind}/{key}/{size}") for size in ("AP", "APs", "APm")]
                cells += [str(summarize(values)) for values in sizes]
            rows.append([key, *cells])
        sizes = ("AP", "AP small", "AP medium")
        headers = [f"{rows_of}: {size}" for rows_of in ("row 1 to 2", "row 3 to 4") for size in sizes]
        tables.append(format_rows(rows, [header, *headers], num_texts=1))

    levels = list_keys(results, "levels", "shared/levels")
    num_depths = len(list_keys(results, "levels", "shared/depths"))
    rows = []
    for training, row in (("shared", "row 1"), ("per_level", "row 3")):
        for depth in range(num_depths):
            values = [summarize(average_distances(results, training, depth, level)) for level in levels]
            rows.append([row, str(depth + 1), *(value.show(2) for value in values)])
    tables.append(format_rows(rows, ["distance in standard deviations", "norm", *levels], num_texts=2))
    return "\n\n".join(tables)


def _format_repair(results: Mapping[str, Any]) -> str:
    seeds = results["trials"]["repair"].values()
    trained = [numbers["as trained"]["AP"] for numbers in seeds]
    levels = list_keys(results, "repair", f"images/{list_keys(results, 'repair', 'images')[0]}/error/0")

    rows = [["none", str(summarize(trained)), "", *([""] * len(levels))]]
    for number in list_keys(results, "repair", "images"):
        draws = [numbers["images"][number] for numbers in seeds]
        means = summarize([statistics.fmean(of_seed["AP"]) for of_seed in draws])
        apart = summarize([statistics.pstdev(of_seed["AP"]) for of_seed in draws])
        errors = []
        for level in levels:
            errors.append(summarize([statistics.fmean(draw[level] for draw in of_seed["error"]) for of_seed in draws]))
        rows.append([number, str(means), apart.show(2), *(error.show(3) for error in errors)])
    headers = ["images", "AP", "deviation between draws", *(f"error {level}" for level in levels)]
    return format_rows(rows, headers, num_texts=1)


def _format_rois(results: Mapping[str, Any]) -> str:
    trained = collect(results, "rois", "AP/as trained/AP")
    rows = []
    for kind in _OF_ROIS:
        aps = collect(results, "rois", f"AP/{kind}/AP")
        difference = compare(aps, trained).show(sign="+") if kind != "as trained" else ""
        objects = summarize(collect(results, "rois", f"objects/{kind}")).show(2) if kind in CHOICES else ""
        errors = summarize(collect(results, "rois", f"errors/{kind}")).show(1) if kind in CHOICES else ""
        rows.append([name(kind), str(summarize(aps)), difference, objects, errors])
    headers = ["statistics at test", "AP", "against as trained", "RoIs on objects", "largest standard error, %"]
    table = format_rows(rows, headers, num_texts=1)

    rows = []
    for path in list_keys(results, "rois", "distances"):
        cells = [summarize(collect(results, "rois", f"distances/{path}/{of}")).show(3) for of in ("mean", "ratio")]
        rows.append([path, *cells])
    headers = ["norm", "distance of means, standard deviations", "log ratio of standard deviations"]
    return f"{table}\n\n{format_rows(rows, headers, num_texts=1)}"

"""The six rows of the paper's Table 5: train the heads that are needed, re-estimate the others, compare.

Rows 1, 3 and 5 are trained. Rows 2, 4 and 6 are the same checkpoints with population statistics
re-estimated per level, without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from bnext.cli.train import check_run
from bnext.config.recipe import read_place
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import is_level_norm
from bnext.layers import TABLE5_ROWS, NormSpec
from bnext.studies.runner import check_rows, load_row, reuse_row, run_study, train_row
from bnext.tables import format_rows

__all__ = ["PAPER_AP", "TRAINED_ROW", "format_table", "load_rows", "order_rows", "run_rows"]

# COCO AP of RetinaNet R50-FPN, 3x; Wu and Johnson 2021, Table 5.
PAPER_AP = {1: 39.1, 2: 2.1, 3: 34.1, 4: 39.1, 5: 35.5, 6: 39.2}
# Row -> the row whose training it uses.
TRAINED_ROW = {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}


def order_rows(rows: list[int]) -> list[int]:
    """The rows to evaluate, each after the row that it is made from, which is added when missing."""
    return sorted({*rows, *(TRAINED_ROW[row] for row in rows)})


def load_rows(
    config_files: Mapping[int, str], output: str, opts: Sequence[str] = (), num_workers: int = 1
) -> dict[int, CfgNode]:
    """The configs of rows, each with its own folder in `output`, checked before anything runs.

    Args:
        config_files: row -> YAML file.
        output: folder of the study.
        opts: KEY VALUE pairs that override every config.
        num_workers: that will train.

    Raises:
        BNextError: a config, a data set or the folder is wrong.
    """
    configs = {row: load_row(file, output, f"row{row}", opts) for row, file in config_files.items()}

    for row, cfg in configs.items():
        spec = read_place(cfg, "RETINANET").norm
        if not isinstance(spec, NormSpec) or spec.table5_row != row:
            thing = f"the config of row {row}"
            rule = f"have its three answers {NormSpec.from_table5_row(row)}"
            remedy = "Correct MODEL.RETINANET.NORM and MODEL.BNEXT.RETINANET."
            raise ConfigError.of(thing, rule, got=str(spec), where=config_files[row], remedy=remedy)
    check_rows(configs)
    check_run(next(iter(configs.values())), num_workers)
    return configs


def run_rows(configs: Mapping[int, CfgNode], output: str, title: str, resume: bool = False) -> None:
    """Train, re-estimate and evaluate rows; print the table and write `output`/results.json.

    Args:
        configs: row -> config with an OUTPUT_DIR of its own, in the order of `order_rows`.
        output: folder for results.json.
        title: heading of our column, for example "digits".
        resume: go on with trainings that are under way; finished ones are evaluated again.

    Note:
        Runs in every worker. results.json is {"rows": {row: metrics}, "seconds": {step: s}} and is
        written anew, whole, after every row.
    """
    run_study(configs, output, _run_row, describe_row, partial(format_table, title=title), resume=resume)


def _run_row(row: int, configs: Mapping[int, CfgNode], seconds: dict[str, float], resume: bool) -> Mapping[str, Any]:
    trained = TRAINED_ROW[row]
    if row == trained:
        return train_row(str(row), configs[row], seconds, resume)
    return reuse_row(str(row), configs[row], seconds, configs[trained], layers=is_level_norm)


def describe_row(row: int) -> str:
    """A row's three answers in words."""
    statistics, population, affine = (cell.replace("_", " ") for cell in TABLE5_ROWS[row])
    return f"mini-batch statistics {statistics}, population {population}, affine {affine}"


def format_table(results: Mapping[str, Any], title: str) -> str:
    """Our AP beside the paper's, row by row, and what each re-estimation changed."""
    aps = {int(row): metrics["bbox/AP"] for row, metrics in results["rows"].items()}

    rows = []
    for row, ap in aps.items():
        trained = TRAINED_ROW[row]
        how, change, paper_change = "trained", "", ""
        if row != trained:
            how = f"row {trained} re-estimated"
            if trained in aps:
                change = f"{ap - aps[trained]:+.1f}"
                paper_change = f"{PAPER_AP[row] - PAPER_AP[trained]:+.1f}"
        answers = [answer.replace("_", " ") for answer in TABLE5_ROWS[row]]
        rows.append([str(row), *answers, how, f"{ap:.1f}", change, f"{PAPER_AP[row]:.1f}", paper_change])

    headers = ["row", "mini-batch", "population", "affine", "how", f"AP {title}", "change", "AP COCO (paper)", "change"]
    return format_rows(rows, headers, num_texts=5)

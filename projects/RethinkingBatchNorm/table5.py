"""The six rows of the paper's Table 5: train the heads that are needed, re-estimate the others, compare.

Rows 1, 3 and 5 are trained. Rows 2, 4 and 6 are the same checkpoints with population statistics
re-estimated per level, without training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from bnext.cli.train import build_parser, check_run
from bnext.config.places import get_head_norm
from bnext.errors import ConfigError
from bnext.evaluation.coco import evaluate_model
from bnext.evaluation.reestimate import repair_checkpoint
from bnext.layers import TABLE5_ROWS, NormSpec
from bnext.studies.runner import check_rows, load_row, run_study, timed, train_row

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
        spec, expected = get_head_norm(cfg), NormSpec.from_table5_row(row)
        if not isinstance(spec, NormSpec) or spec.table5_row != row:
            raise ConfigError(
                f"the config of row {row} must have its three answers {expected}; got {spec} ({config_files[row]}). "
                f"Correct MODEL.RETINANET.NORM and MODEL.BNEXT.RETINANET."
            )
    check_rows(configs)
    check_run(next(iter(configs.values())), build_parser().parse_args(["--num-gpus", str(num_workers)]))
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
    run_row = partial(_run_row, configs=configs, resume=resume)
    run_study(configs, output, run_row, describe_row, partial(format_table, title=title), resume=resume)


def describe_row(row: int) -> str:
    """A row's three answers in words."""
    statistics, population, affine = (cell.replace("_", " ") for cell in TABLE5_ROWS[row])
    return f"mini-batch statistics {statistics}, population {population}, affine {affine}"


def format_table(results: Mapping[str, Any], title: str) -> str:
    """Our AP beside the paper's, row by row, and what each re-estimation changed."""
    lines = []
    for key, metrics in results["rows"].items():
        row, trained = int(key), TRAINED_ROW[int(key)]
        source = results["rows"].get(str(trained), {})
        is_repair = row != trained and "bbox/AP" in source
        lines.append(
            [
                str(row),
                *(cell.replace("_", " ") for cell in TABLE5_ROWS[row]),
                "trained" if row == trained else f"row {trained} re-estimated",
                f"{metrics['bbox/AP']:.1f}",
                f"{metrics['bbox/AP'] - source['bbox/AP']:+.1f}" if is_repair else "",
                f"{PAPER_AP[row]:.1f}",
                f"{PAPER_AP[row] - PAPER_AP[trained]:+.1f}" if is_repair else "",
            ]
        )
    headers = ["row", "mini-batch", "population", "affine", "how", f"AP {title}", "change", "AP COCO (paper)", "change"]
    aligned = ["left"] * 5 + ["right"] * 4
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=aligned)  # tabulate drops a plus sign


def _run_row(
    row: int, cfg: CfgNode, seconds: dict[str, float], configs: Mapping[int, CfgNode], resume: bool
) -> Mapping[str, Any]:
    trained = TRAINED_ROW[row]
    if row == trained:
        return train_row(row, cfg, seconds, resume)
    with timed(seconds, f"reestimate_row{row}"):
        model = repair_checkpoint(cfg, os.path.join(configs[trained].OUTPUT_DIR, "model_final.pth"))
    with timed(seconds, f"evaluate_row{row}"):
        return evaluate_model(cfg, model)

"""The six rows of the paper's Table 5: train the heads that are needed, re-estimate the others, compare.

Rows 1, 3 and 5 are trained. Rows 2, 4 and 6 are the same checkpoints with population statistics
re-estimated per level, without training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from bnext.config import get_head_norm
from bnext.engine.command import build_parser, check_run, load_config
from bnext.engine.evaluation import evaluate_model
from bnext.engine.recompute import repair_checkpoint
from bnext.engine.trainer import train
from bnext.errors import ConfigError
from bnext.files import replace_file
from bnext.layers import TABLE5_ROWS, NormSpec

__all__ = ["PAPER_AP", "TRAINED_ROW", "format_table", "load_rows", "order_rows", "run_rows"]

# COCO AP of RetinaNet R50-FPN, 3x; Wu and Johnson 2021, Table 5.
PAPER_AP = {1: 39.1, 2: 2.1, 3: 34.1, 4: 39.1, 5: 35.5, 6: 39.2}
# Row -> the row whose training it uses.
TRAINED_ROW = {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}

logger = logging.getLogger(__name__)


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
    if "OUTPUT_DIR" in opts:
        raise ConfigError(
            f"OUTPUT_DIR must not be among the pairs, as every row has a folder of its own; got {list(opts)}. "
            f"Use --output."
        )
    configs = {}
    for row, file in config_files.items():
        configs[row] = load_config(file, [*opts, "OUTPUT_DIR", os.path.join(output, f"row{row}")])
    for row, cfg in configs.items():
        spec, expected = get_head_norm(cfg), NormSpec.from_table5_row(row)
        if not isinstance(spec, NormSpec) or spec.table5_row != row:
            raise ConfigError(
                f"the config of row {row} must have its three answers {expected}; got {spec} ({config_files[row]}). "
                f"Correct MODEL.RETINANET.NORM and MODEL.BNEXT.RETINANET."
            )
    for row, cfg in configs.items():
        if cfg.TEST.PRECISE_BN.NUM_ITER < 1:
            raise ConfigError(
                f"TEST.PRECISE_BN.NUM_ITER, the batches of a re-estimation, must be 1 or more; "
                f"got {cfg.TEST.PRECISE_BN.NUM_ITER} (row {row}). Use 50."
            )
        if len(cfg.DATASETS.TEST) != 1:
            raise ConfigError(
                f"DATASETS.TEST must name one data set, which gives the table its AP; got {cfg.DATASETS.TEST} "
                f"(row {row}). Name one."
            )
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
    results: dict[str, Any] = {"rows": {}, "seconds": {}}
    file = Path(output, "results.json")
    if file.exists() and not resume and comm.is_main_process():
        logger.warning("%s of an earlier study will be overwritten. Use --resume or another --output to keep it.", file)
    if resume and file.exists():
        results = json.loads(file.read_text())
    _set_up_logging(output)
    for row, cfg in configs.items():
        logger.info("Row %d: %s.", row, describe_row(row))
        metrics = _run_row(row, cfg, configs, results["seconds"], resume)
        results["rows"][str(row)] = _flatten(metrics)
        if comm.is_main_process():
            replace_file(file, lambda partial: partial.write(f"{json.dumps(results, indent=2)}\n".encode()))
    if comm.is_main_process():
        print(format_table(results, title), flush=True)


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
    row: int, cfg: CfgNode, configs: Mapping[int, CfgNode], seconds: dict[str, float], resume: bool
) -> Mapping[str, Any]:
    trained = TRAINED_ROW[row]
    if comm.is_main_process():
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        if not resume:  # else an interrupted new study would later go on with the old one's checkpoint
            Path(cfg.OUTPUT_DIR, "last_checkpoint").unlink(missing_ok=True)
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())
    if row == trained:
        with _timed(seconds, f"train_and_evaluate_row{row}"):
            return train(cfg, resume=resume)
    with _timed(seconds, f"reestimate_row{row}"):
        model = repair_checkpoint(cfg, os.path.join(configs[trained].OUTPUT_DIR, "model_final.pth"))
    with _timed(seconds, f"evaluate_row{row}"):
        return evaluate_model(cfg, model)


def _flatten(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """{"bbox/AP": ...}; a model without a single detection has AP 0, a size without objects has none."""
    boxes = metrics.get("bbox", {})
    has_no_detections = all(math.isnan(value) for value in boxes.values())
    return {
        f"bbox/{name}": 0.0 if has_no_detections else None if math.isnan(value) else value
        for name, value in boxes.items()
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Wall seconds of a step; those of a training that went on are added up."""
    start = time.perf_counter()
    yield
    seconds[step] = round(seconds.get(step, 0) + time.perf_counter() - start, 1)


def _set_up_logging(output: str) -> None:
    """On the screen: bnext's lines, the metrics of the training, and warnings. log.txt keeps everything."""
    for name in ("detectron2", "fvcore", "bnext"):
        for handler in setup_logger(output, distributed_rank=comm.get_rank(), name=name).handlers:
            if type(handler) is logging.StreamHandler and _is_worth_showing not in handler.filters:
                handler.addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    is_ours = record.name.startswith(("bnext", "detectron2.utils.events")) and record.name != "bnext.engine.evaluation"
    return is_ours or record.levelno >= logging.WARNING


"""What the reproductions of tables share: checks before anything runs, logging, timing, results.json, resuming.

A study has rows. Some are trained; the others are made from the checkpoint of one that is. What the rows of a
table are is in the module of that table.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bnext.config.load import load_config
from bnext.engine.trainer import train
from bnext.errors import ConfigError
from bnext.evaluation.coco import flatten_metrics
from bnext.files import write_json

__all__ = ["check_rows", "load_row", "prepare_folder", "run_study", "set_up_logging", "timed", "train_row"]

Row = TypeVar("Row", bound=Hashable)

logger = logging.getLogger(__name__)


def load_row(file: str, output: str, folder: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a row, with a folder of its own in that of the study.

    Args:
        file: YAML.
        output: folder of the study.
        folder: the row's, in `output`.
        opts: KEY VALUE pairs that override the file.

    Raises:
        ConfigError: the config is wrong, or the pairs say where results go.
    """
    if "OUTPUT_DIR" in opts:
        raise ConfigError(
            f"OUTPUT_DIR must not be among the pairs, as every row has a folder of its own; got {list(opts)}. "
            f"Use --output."
        )
    return load_config(file, [*opts, "OUTPUT_DIR", os.path.join(output, folder)])


def check_rows(configs: Mapping[Row, CfgNode]) -> None:
    """What the configs of all rows must allow: re-estimation, and one AP for each.

    Raises:
        ConfigError: names the key and the row.
    """
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


def run_study(
    configs: Mapping[Row, CfgNode],
    output: str,
    run_row: Callable[[Row, CfgNode, dict[str, float]], Mapping[str, Any]],
    describe: Callable[[Row], str],
    show: Callable[[Mapping[str, Any]], str],
    *,
    tasks: Sequence[str] = ("bbox",),
    resume: bool = False,
) -> None:
    """Run rows one after another; write `output`/results.json after each, and print the table at the end.

    Args:
        configs: row -> config, each with an OUTPUT_DIR of its own, in an order in which they can run.
        output: folder for results.json.
        run_row: called as run_row(row, cfg, seconds); gives COCO's metrics, enters in `seconds` what a step took.
        describe: a row in words, for the log.
        show: the table of results.json's content.
        tasks: of COCO's metrics that are kept.
        resume: keep the results that are there.

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
    comm.synchronize()  # every worker has read the file before one writes it
    set_up_logging(output)
    for row, cfg in configs.items():
        logger.info("Row %s: %s.", row, describe(row))
        prepare_folder(cfg, resume)
        results["rows"][str(row)] = flatten_metrics(run_row(row, cfg, results["seconds"]), tasks)
        if comm.is_main_process():
            write_json(file, results)
    if comm.is_main_process():
        print(show(results), flush=True)


def train_row(row: Hashable, cfg: CfgNode, seconds: dict[str, float], resume: bool) -> Mapping[str, Any]:
    """Train and evaluate a row; see `bnext.engine.train`."""
    with timed(seconds, f"train_and_evaluate_row{row}"):
        return train(cfg, resume=resume)


@contextlib.contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Wall seconds of a step; those of a training that went on are added up."""
    start = time.perf_counter()
    yield
    seconds[step] = round(seconds.get(step, 0) + time.perf_counter() - start, 1)


def prepare_folder(cfg: CfgNode, resume: bool = False) -> None:
    """Make OUTPUT_DIR and write config.yaml into it; without `resume` it forgets an earlier training."""
    if not comm.is_main_process():
        return
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    if not resume:  # else an interrupted new study would later go on with the old one's checkpoint
        Path(cfg.OUTPUT_DIR, "last_checkpoint").unlink(missing_ok=True)
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())


def set_up_logging(output: str) -> None:
    """On the screen: bnext's lines, the metrics of the training, and warnings. log.txt keeps everything."""
    for name in ("detectron2", "fvcore", "bnext"):
        for handler in setup_logger(output, distributed_rank=comm.get_rank(), name=name).handlers:
            if type(handler) is logging.StreamHandler and _is_worth_showing not in handler.filters:
                handler.addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    is_ours = record.name.startswith(("bnext", "detectron2.utils.events")) and record.name != "bnext.evaluation.coco"
    return is_ours or record.levelno >= logging.WARNING

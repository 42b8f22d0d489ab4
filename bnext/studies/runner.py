"""Runs the rows of a study: checks before anything runs, logging, timing, results.json, resuming.

A study has rows. Some are trained; the others are made from the checkpoint of one that is. What the rows of a
table are is in the module of that table.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from detectron2.config import CfgNode
from detectron2.utils import comm

from bnext.checkpoints import load_model
from bnext.config.load import load_config
from bnext.engine.trainer import train
from bnext.errors import ConfigError
from bnext.evaluation.coco import evaluate_model, flatten_metrics
from bnext.evaluation.reestimate import repair_checkpoint
from bnext.layers.walk import Selection
from bnext.studies.results_file import keeping_results

__all__ = [
    "Training",
    "check_rows",
    "collect_values",
    "find_final_model",
    "load_row",
    "prepare_folder",
    "reuse_row",
    "run_study",
    "timed",
    "train_row",
]

Row = TypeVar("Row", bound=Hashable)
RunRow = Callable[[Row, Mapping[Row, CfgNode], dict[str, float], bool], Mapping[str, Any]]

logger = logging.getLogger(__name__)


class Training(NamedTuple):
    """A row of a study with a seed: a training, or what is made from one.

    Args:
        row: number or name.
        seed: of the training.

    Example:
        >>> str(Training(4, 2)), Training(4, 2).folder, Training("clean", 1).folder
        ('4, seed 2', 'row4_seed2', 'clean_seed1')
    """

    row: int | str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Its folder in that of the study."""
        return f"row{self.row}_seed{self.seed}" if isinstance(self.row, int) else f"{self.row}_seed{self.seed}"


def collect_values(results: Mapping[str, Any], row: int | str, key: str) -> dict[int, float | None]:
    """A number of a row by seed, in the order of seeds.

    Args:
        results: content of a results.json whose rows are trainings.
        row: number or name.
        key: of the number, such as "bbox/AP".
    """
    values = {}
    for name, metrics in results["rows"].items():
        other, _, seed = name.rpartition(", seed ")
        if other == str(row) and key in metrics:
            values[int(seed)] = metrics[key]
    return dict(sorted(values.items()))


def load_row(file: str, output: str, folder: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a row, with a folder of its own in that of the study.

    Args:
        file: YAML.
        output: folder of the study.
        folder: the row's, in `output`.
        opts: KEY VALUE pairs that override the file.

    Raises:
        ConfigError: the config is wrong, or the pairs say where results go, or give a seed to what has one.
    """
    if "OUTPUT_DIR" in opts:
        rule = "not be among the pairs, as every row has a folder of its own"
        raise ConfigError.of("OUTPUT_DIR", rule, got=list(opts), remedy="Use --output.")
    if opts.count("SEED") > 1:
        rule = "not be among the pairs, as every training has its seed"
        raise ConfigError.of("SEED", rule, got=list(opts), remedy="Use --seeds.")

    return load_config(file, [*opts, "OUTPUT_DIR", os.path.join(output, folder)])


def check_rows(configs: Mapping[Row, CfgNode]) -> None:
    """Refuse configs of rows that allow no re-estimation, or not one AP each.

    Raises:
        ConfigError: names the key and the row.
    """
    for row, cfg in configs.items():
        number, sets = cfg.TEST.PRECISE_BN.NUM_ITER, cfg.DATASETS.TEST
        if number < 1:
            thing = "TEST.PRECISE_BN.NUM_ITER, the batches of a re-estimation,"
            raise ConfigError.of(thing, "be 1 or more", got=number, where=f"row {row}", remedy="Use 50.")
        if len(sets) != 1:
            rule = "name one data set, which gives the table its AP"
            raise ConfigError.of("DATASETS.TEST", rule, got=sets, where=f"row {row}", remedy="Name one.")


def run_study(
    configs: Mapping[Row, CfgNode],
    output: str,
    run_row: RunRow[Row],
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
        run_row: called as run_row(row, configs, seconds, resume); gives COCO's metrics, enters in `seconds` what a step
            took.
        describe: a row in words, for the log.
        show: the table of results.json's content.
        tasks: of COCO's metrics that are kept.
        resume: keep the results that are there.

    Note:
        Runs in every worker. results.json is {"rows": {row: metrics}, "seconds": {step: s}} and is
        written anew, whole, after every row.
    """
    with keeping_results(output, {"rows": {}, "seconds": {}}, resume=resume) as results:
        for row, cfg in configs.items():
            logger.info("Row %s: %s.", row, describe(row))
            prepare_folder(cfg, resume)
            metrics = run_row(row, configs, results.content["seconds"], resume)
            results.content["rows"][str(row)] = flatten_metrics(metrics, tasks)
            results.write()

        if comm.is_main_process():
            print(show(results.content), flush=True)


def train_row(label: str, cfg: CfgNode, seconds: dict[str, float], resume: bool) -> Mapping[str, Any]:
    """Train and evaluate a row; see `bnext.engine.train`."""
    with timed(seconds, f"train_and_evaluate_row{label}"):
        return train(cfg, resume=resume)


def reuse_row(
    label: str,
    cfg: CfgNode,
    seconds: dict[str, float],
    trained: CfgNode,
    *,
    reestimates: bool = True,
    layers: Selection | None = None,
) -> Mapping[str, Any]:
    """Evaluate the checkpoint that another row has trained, as the model of this one.

    Args:
        label: of the row, in the names of the steps in `seconds`.
        cfg: of the row.
        seconds: see `run_study`.
        trained: config of the other row.
        reestimates: whether population statistics are estimated anew, and saved as the row's own model.
        layers: of which norms, see `recompute_statistics`.
    """
    weights = find_final_model(trained)

    if reestimates:
        with timed(seconds, f"reestimate_row{label}"):
            model = repair_checkpoint(cfg, weights, layers)
    else:
        model = load_model(cfg, weights)

    with timed(seconds, f"evaluate_row{label}"):
        return evaluate_model(cfg, model)


def find_final_model(cfg: CfgNode) -> str:
    """The file of the model at the end of a training."""
    return os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


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

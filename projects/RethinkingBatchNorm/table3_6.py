"""The paper's Tables 3 and 6: which RoIs are a mini-batch in the heads of Mask R-CNN, in training and at test.

Box AP is Table 3, mask AP Table 6. Rows that differ in training are trained; the others are their checkpoints
with other statistics at test.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer, load_model
from bnext.cli.train import build_parser, check_run
from bnext.config.places import get_norm_name
from bnext.data.sampler import check_batch_size
from bnext.engine.launch import count_workers
from bnext.errors import ConfigError
from bnext.evaluation.coco import evaluate_model
from bnext.evaluation.reestimate import recompute_statistics
from bnext.studies.runner import check_rows, load_row, run_study, timed, train_row

__all__ = ["DEFAULT_ROWS", "ROWS", "Row", "check_names", "format_table", "load_rows", "order_rows", "run_rows"]

HEADS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD")


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Args:
        trained: the row whose training it uses; its own name where it is trained.
        norm: MODEL.*.NORM of both heads.
        shuffle: MODEL.BNEXT.*.SHUFFLE of both heads.
        images: of a worker, in one step; 0: the row does not depend on them.
        inference: statistics that normalize at test, MODEL.BNEXT.*.INFERENCE of both heads.
        rois: on which population statistics are estimated anew; "" those of the checkpoint are kept.
        paper: box AP and mask AP on COCO of Mask R-CNN R50-FPN, 3x; Wu and Johnson 2021, Tables 3 and 6.
    """

    trained: str
    norm: str
    shuffle: str = "none"
    images: int = 0
    inference: str = "population"
    rois: str = ""
    paper: tuple[float, float] | None = None

    @property
    def opts(self) -> list[str]:
        """What the row changes in the config of its training."""
        changed = [f"MODEL.BNEXT.{head}.INFERENCE" for head in HEADS] if self.inference != "population" else []
        rois = ["TEST.BNEXT.PRECISE_BN.ROIS", self.rois] if self.rois else []
        return [word for key in changed for word in (key, self.inference)] + rois


ROWS = {
    "bn_2": Row("bn_2", "BN", images=2, paper=(40.1, 36.2)),
    "bn_2_mini_batch": Row("bn_2", "BN", images=2, inference="mini_batch", paper=(41.3, 37.0)),
    "bn_1": Row("bn_1", "BN", images=1, paper=(30.7, 27.9)),
    "bn_1_top_scored": Row("bn_1", "BN", images=1, rois="top_scored"),
    "bn_1_mini_batch": Row("bn_1", "BN", images=1, inference="mini_batch", paper=(41.5, 37.0)),
    "shuffle_1": Row("shuffle_1", "BN", "statistics", images=1, paper=(41.7, 37.7)),
    "shuffle_2": Row("shuffle_2", "BN", "statistics", images=2, paper=(41.6, 37.6)),
    "syncbn": Row("syncbn", "SyncBN", paper=(41.7, 37.7)),
    "gn": Row("gn", "GN", paper=(41.4, 37.7)),
    "none": Row("none", "", paper=(41.1, 36.9)),
}
DEFAULT_ROWS = ("bn_1", "bn_1_top_scored", "bn_1_mini_batch", "shuffle_1", "syncbn")


def check_names(rows: Iterable[str]) -> None:
    """Refuse rows that there are not.

    Raises:
        ConfigError: names them, and those that there are.
    """
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise ConfigError(
            f"--rows must be of {', '.join(ROWS)}; got {', '.join(unknown)}. Choose among them, or leave --rows away "
            f"for {', '.join(DEFAULT_ROWS)}."
        )


def order_rows(rows: Iterable[str]) -> list[str]:
    """The rows to evaluate, each after the row that it is made from, which is added when missing."""
    wanted = {name for row in rows for name in (row, ROWS[row].trained)}
    return [row for row in ROWS if row in wanted]


def load_rows(
    config_files: Mapping[str, str], output: str, opts: Sequence[str] = (), num_workers: int = 1
) -> dict[str, CfgNode]:
    """The configs of rows, each with its own folder in `output`, checked before anything runs.

    Args:
        config_files: row -> YAML file of its training.
        output: folder of the study.
        opts: KEY VALUE pairs that override every config.
        num_workers: that will train.

    Raises:
        BNextError: a row, a config, a data set or the folder is wrong.
    """
    check_names(config_files)
    configs = {row: load_row(file, output, row, [*ROWS[row].opts, *opts]) for row, file in config_files.items()}
    num_workers = count_workers(num_workers, device=next(iter(configs.values())).MODEL.DEVICE)
    for row, cfg in configs.items():
        _check_row(row, cfg, config_files[row])
        _check_images(row, cfg, num_workers)
        check_batch_size(cfg.SOLVER.IMS_PER_BATCH, num_workers)
    check_rows(configs)
    check_run(next(iter(configs.values())), build_parser().parse_args(["--num-gpus", str(num_workers)]))
    return configs


def _check_row(row: str, cfg: CfgNode, file: str) -> None:
    """The config is of the row, in both heads, and the population of the row's RoIs."""
    expected = ROWS[row]
    rois = cfg.TEST.BNEXT.PRECISE_BN.ROIS
    if rois != (expected.rois or "sampled"):
        raise ConfigError(
            f"TEST.BNEXT.PRECISE_BN.ROIS must be {expected.rois or 'sampled'!r} in row {row}; got {rois!r} (--opts or "
            f"{file}). Leave it out: {', '.join(name for name, other in ROWS.items() if other.rois)} has the others."
        )
    for head in HEADS:
        node, norm = cfg.MODEL.BNEXT[head], get_norm_name(cfg, head)
        found = (norm, node.SHUFFLE, node.INFERENCE)
        wanted = (expected.norm, expected.shuffle, expected.inference)
        if found != wanted:
            raise ConfigError(
                f"the config of row {row} must have NORM, SHUFFLE and INFERENCE {wanted} in {head}; got {found} "
                f"({file}). Correct MODEL.{head}.NORM and MODEL.BNEXT.{head}."
            )


def _check_images(row: str, cfg: CfgNode, num_workers: int) -> None:
    """Each worker has as many images as the row says."""
    images, total = ROWS[row].images, cfg.SOLVER.IMS_PER_BATCH
    if ROWS[row].shuffle != "none" and num_workers < 2:
        raise ConfigError(
            f"--num-gpus must be 2 or more for a row with shuffle; got {num_workers} (row {row}). One worker has "
            f"nobody to deal RoIs to."
        )
    if images and total != images * num_workers:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH must be {images} image(s) for each of the {num_workers} worker(s); got {total} "
            f"(row {row}). Use --num-gpus {total // images}, or --opts SOLVER.IMS_PER_BATCH {images * num_workers} "
            f"with a schedule that fits."
        )


def run_rows(configs: Mapping[str, CfgNode], output: str, title: str, resume: bool = False) -> None:
    """Train and evaluate rows; print the table and write `output`/results.json.

    Args:
        configs: row -> config with an OUTPUT_DIR of its own, in the order of `order_rows`.
        output: folder for results.json.
        title: heading of our columns, for example "digits".
        resume: go on with trainings that are under way; finished ones are evaluated again.

    Note:
        Runs in every worker. results.json: see `bnext.studies.runner.run_study`.
    """
    run_row = partial(_run_row, configs=configs, resume=resume)
    show = partial(format_table, title=title)
    run_study(configs, output, run_row, _describe, show, tasks=("bbox", "segm"), resume=resume)


def _run_row(
    row: str, cfg: CfgNode, seconds: dict[str, float], configs: Mapping[str, CfgNode], resume: bool
) -> Mapping[str, Any]:
    trained = ROWS[row].trained
    if row == trained:
        return train_row(f"_{row}", cfg, seconds, resume)
    model = load_model(cfg, os.path.join(configs[trained].OUTPUT_DIR, "model_final.pth"))
    if ROWS[row].rois:
        with timed(seconds, f"reestimate_row_{row}"):
            _reestimate(cfg, model)
    with timed(seconds, f"evaluate_row_{row}"):
        return evaluate_model(cfg, model.eval())


def _reestimate(cfg: CfgNode, model: nn.Module) -> None:
    recompute_statistics(cfg, model)
    Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process()).save("model_final")
    comm.synchronize()


def _describe(row: str) -> str:
    return ", ".join(word for word in _name_cells(row) if word)


def _name_cells(row: str) -> list[str]:
    """Norm, images of a worker, statistics at test, and how the row is made."""
    what = ROWS[row]
    names = {"BN": "per-worker BN", "": "no norm"}
    norm = names.get(what.norm, what.norm) + (" + shuffle" if what.shuffle != "none" else "")
    at_test = {"population": "population", "mini_batch": "mini-batch (RoIs of one image)"}[what.inference]
    if what.norm in ("GN", ""):
        at_test = ""
    if what.rois:
        at_test += f" of {what.rois.replace('_', '-')} RoIs"
    how = "trained" if row == what.trained else f"{what.trained} {'re-estimated' if what.rois else 'evaluated'}"
    return [norm, f"{what.images} image(s) per worker" if what.images else "", at_test, how]


def format_table(results: Mapping[str, Any], title: str) -> str:
    """Our box AP and mask AP beside the paper's, row by row."""
    lines = []
    for row in (row for row in ROWS if row in results["rows"]):
        metrics, paper = results["rows"][row], ROWS[row].paper or ()
        norm, images, at_test, how = _name_cells(row)
        ours = [f"{metrics.get(f'{task}/AP', 0.0):.1f}" for task in ("bbox", "segm")]
        lines.append(
            [row, norm, images.partition(" ")[0] or "-", at_test or "-", how, *ours]
            + ([f"{ap:.1f}" for ap in paper] or ["n.r.", "n.r."])
        )
    headers = ["row", "norm of the heads", "images per worker", "statistics at test", "how"]
    headers += [f"box AP {title}", f"mask AP {title}", "box AP COCO (paper)", "mask AP COCO (paper)"]
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=["left"] * 5 + ["right"] * 4)

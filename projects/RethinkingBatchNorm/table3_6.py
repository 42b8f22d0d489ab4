"""The paper's Tables 3 and 6: which RoIs are a mini-batch in the heads of Mask R-CNN, in training and at test.

Box AP is Table 3, mask AP Table 6. Rows that differ in training are trained; the others are their checkpoints
with other statistics at test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from bnext.cli.train import check_run
from bnext.config.recipe import read_place
from bnext.data.sampling.samplers import check_batch_size
from bnext.engine.launch import count_workers
from bnext.errors import ConfigError
from bnext.studies.runner import check_rows, load_row, reuse_row, run_study, train_row
from bnext.tables import format_rows

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
        """KEY VALUE pairs that the row changes in the config of its training."""
        opts = []
        if self.inference != "population":
            for head in HEADS:
                opts += [f"MODEL.BNEXT.{head}.INFERENCE", self.inference]
        if self.rois:
            opts += ["TEST.BNEXT.PRECISE_BN.ROIS", self.rois]
        return opts


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
        remedy = f"Choose among them, or leave --rows away for {', '.join(DEFAULT_ROWS)}."
        raise ConfigError.of("--rows", f"be of {', '.join(ROWS)}", got=", ".join(unknown), remedy=remedy)


def order_rows(rows: Sequence[str]) -> list[str]:
    """The rows to evaluate, each after the row that it is made from, which is added when missing."""
    wanted = {*rows, *(ROWS[row].trained for row in rows)}
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
    check_run(next(iter(configs.values())), num_workers)
    return configs


def _check_row(row: str, cfg: CfgNode, file: str) -> None:
    """The config is of the row, in both heads, and the population of the row's RoIs."""
    expected = ROWS[row]

    rois, wanted_rois = cfg.TEST.BNEXT.PRECISE_BN.ROIS, expected.rois or "sampled"
    if rois != wanted_rois:
        others = ", ".join(name for name, other in ROWS.items() if other.rois)
        thing = "TEST.BNEXT.PRECISE_BN.ROIS"
        rule = f"be {wanted_rois!r} in row {row}"
        remedy = f"Leave it out: {others} has the others."
        raise ConfigError.of(thing, rule, got=repr(rois), where=f"--opts or {file}", remedy=remedy)

    wanted = (expected.norm, expected.shuffle, expected.inference)
    for head in HEADS:
        norm = read_place(cfg, head)
        answers = (norm.name, norm.shuffle, norm.spec.inference)
        if answers != wanted:
            rule = f"have NORM, SHUFFLE and INFERENCE {wanted} in {head}"
            remedy = f"Correct MODEL.{head}.NORM and MODEL.BNEXT.{head}."
            raise ConfigError.of(f"the config of row {row}", rule, got=answers, where=file, remedy=remedy)


def _check_images(row: str, cfg: CfgNode, num_workers: int) -> None:
    """Each worker has as many images as the row says."""
    images, total = ROWS[row].images, cfg.SOLVER.IMS_PER_BATCH

    if ROWS[row].shuffle != "none" and num_workers < 2:
        rule, remedy = "be 2 or more for a row with shuffle", "One worker has nobody to deal RoIs to."
        raise ConfigError.of("--num-gpus", rule, got=num_workers, where=f"row {row}", remedy=remedy)
    if images and total != images * num_workers:
        rule = f"be {images} image(s) for each of the {num_workers} worker(s)"
        pairs = f"SOLVER.IMS_PER_BATCH {images * num_workers}"
        remedy = f"Use --num-gpus {total // images}, or --opts {pairs} with a schedule that fits."
        raise ConfigError.of("SOLVER.IMS_PER_BATCH", rule, got=total, where=f"row {row}", remedy=remedy)


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
    show = partial(format_table, title=title)
    run_study(configs, output, _run_row, _describe, show, tasks=("bbox", "segm"), resume=resume)


def _run_row(row: str, configs: Mapping[str, CfgNode], seconds: dict[str, float], resume: bool) -> Mapping[str, Any]:
    trained = ROWS[row].trained
    if row == trained:
        return train_row(f"_{row}", configs[row], seconds, resume)
    return reuse_row(f"_{row}", configs[row], seconds, configs[trained], reestimates=bool(ROWS[row].rois))


def _describe(row: str) -> str:
    return ", ".join(word for word in _name_cells(row) if word)


def _name_cells(name: str) -> list[str]:
    """Norm, images of a worker, statistics at test, and how the row is made."""
    row = ROWS[name]

    norm = {"BN": "per-worker BN", "": "no norm"}.get(row.norm, row.norm)
    if row.shuffle != "none":
        norm += " + shuffle"
    images = f"{row.images} image(s) per worker" if row.images else ""

    at_test = {"population": "population", "mini_batch": "mini-batch (RoIs of one image)"}[row.inference]
    if row.norm in ("GN", ""):
        at_test = ""
    how = "trained" if name == row.trained else f"{row.trained} evaluated"
    if row.rois:
        at_test += f" of {row.rois.replace('_', '-')} RoIs"
        how = f"{row.trained} re-estimated"

    return [norm, images, at_test, how]


def format_table(results: Mapping[str, Any], title: str) -> str:
    """Our box AP and mask AP beside the paper's, row by row."""
    lines = []
    for name, row in ROWS.items():
        if name not in results["rows"]:
            continue
        norm, images, at_test, how = _name_cells(name)
        metrics = results["rows"][name]
        ours = [f"{metrics.get(f'{task}/AP', 0.0):.1f}" for task in ("bbox", "segm")]
        papers = [f"{ap:.1f}" for ap in row.paper] if row.paper else ["n.r.", "n.r."]
        lines.append([name, norm, images.partition(" ")[0] or "-", at_test or "-", how, *ours, *papers])

    headers = ["row", "norm of the heads", "images per worker", "statistics at test", "how"]
    headers += [f"box AP {title}", f"mask AP {title}", "box AP COCO (paper)", "mask AP COCO (paper)"]
    return format_rows(lines, headers, num_texts=5)

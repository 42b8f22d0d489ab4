"""Train or evaluate a config: what stands between the command line of `tools/train_net.py` and the trainer.

Everything that can be known to be wrong is found here, before workers start.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bnext.checkpoints.checkpointer import check_eval_weights, find_missing_weights
from bnext.data.check_coco import check_datasets
from bnext.data.samplers import check_batch_size
from bnext.engine.launch import count_workers, launch
from bnext.engine.output import holding_output
from bnext.engine.streams import guard_log_files
from bnext.engine.trainer import check_same_config, evaluate, train
from bnext.errors import ConfigError, LaunchError
from bnext.evaluation.coco import check_evaluator
from bnext.files import check_can_write, explain_os_error, find_local_file

__all__ = ["build_parser", "check_run", "run"]

_FILES = ("config.yaml", "metrics.json", "last_checkpoint", "model_final.pth")
_BYTES_TRIED = 1 << 16  # a full disk still makes empty files


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's command line; --dist-url is by default a free port of this machine."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    return parser


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check everything, start the workers, and train or evaluate.

    Args:
        cfg: from `load_config`.
        args: of Detectron2's `default_argument_parser`: resume, eval_only, num_gpus, num_machines,
            machine_rank, dist_url, config_file.

    Raises:
        BNextError: what is wrong, before training starts wherever it can be known.
    """
    check_run(
        cfg,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        eval_only=args.eval_only,
        resume=args.resume,
    )
    try:
        launch(
            run_worker,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            args=(cfg, args),
            device=cfg.MODEL.DEVICE,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("" if args.eval_only else _describe_kept(cfg.OUTPUT_DIR)) from None


def _describe_kept(folder: str) -> str:
    if os.path.isfile(os.path.join(folder, "last_checkpoint")):
        return f"--resume goes on from the last checkpoint in {folder}"
    return f"there is no checkpoint in {folder} yet"


def run_worker(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Train or evaluate in one worker. See `run` for the arguments."""
    check_same_config(cfg)
    if args.eval_only:
        _set_up(cfg, args)
        evaluate(cfg, resume=args.resume)
        return

    with holding_output(cfg.OUTPUT_DIR):
        _set_up(cfg, args)
        _train(cfg, args)


def _set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bnext")
    guard_log_files()


def _train(cfg: CfgNode, args: argparse.Namespace) -> None:
    if not args.resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        logging.getLogger(__name__).warning(
            "OUTPUT_DIR %s holds an earlier training: its checkpoints will be overwritten and metrics.json appended "
            "to. Use --resume to continue it, or another OUTPUT_DIR to keep it.",
            cfg.OUTPUT_DIR,
        )
        comm.synchronize()  # every worker has seen the file
        if comm.is_main_process():  # else an interrupted new training would later go on with the old one
            os.remove(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))

    train(cfg, resume=args.resume)


def check_run(
    cfg: CfgNode,
    num_gpus: int = 1,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    eval_only: bool = False,
    resume: bool = False,
) -> None:
    """Find what would stop the run: workers, batch size, data sets, weights, output directory; the quick checks first.

    Args:
        cfg: from `load_config`.
        num_gpus, num_machines, machine_rank, dist_url, eval_only, resume: options of Detectron2's command line.

    Raises:
        ConfigError, DatasetError, CheckpointError, LaunchError: what is wrong.
    """
    num_workers = count_workers(num_gpus, num_machines, machine_rank, dist_url, device=cfg.MODEL.DEVICE)

    which = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[which]:
        raise ConfigError.of(
            f"DATASETS.{which}", "name at least one data set", got="none", remedy="Name one in the config."
        )
    if not eval_only:
        # With REFERENCE_WORLD_SIZE Detectron2 scales the batch from that many workers to those that there are.
        check_batch_size(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers)
    for name in cfg.DATASETS.TEST:
        if name in DatasetCatalog:  # else check_datasets says so
            check_evaluator(name)

    num_classes = _count_classes(cfg)
    if not eval_only:
        check_datasets(cfg.DATASETS.TRAIN, num_classes=num_classes)
    check_datasets(cfg.DATASETS.TEST, num_classes=num_classes, training=False)

    _check_weights(cfg, eval_only=eval_only, resume=resume)
    _check_output(cfg.OUTPUT_DIR, () if eval_only else _FILES)


def _count_classes(cfg: CfgNode) -> int | None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture.endswith(("RetinaNet", "FCOS")):
        return int(cfg.MODEL.RETINANET.NUM_CLASSES)
    return int(cfg.MODEL.ROI_HEADS.NUM_CLASSES) if architecture.endswith("RCNN") else None


def _check_weights(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    if resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return  # they are not read

    if eval_only:
        check_eval_weights(cfg.MODEL.WEIGHTS)
        missing = find_missing_weights(cfg.MODEL.WEIGHTS)
    else:
        missing = find_missing_weights(cfg.MODEL.WEIGHTS, "Correct the path, or set it to ''.")
    if missing is not None:
        raise missing


def _check_output(folder: str, files: Sequence[str]) -> None:
    """The folder takes files, also that of evaluations, and nothing in it stands in the way of those that are written.

    Args:
        folder: OUTPUT_DIR.
        files: of a training, in it.
    """
    if find_local_file(folder) is None:
        return

    inference = os.path.join(folder, "inference")
    try:
        os.makedirs(folder, exist_ok=True)
        for place in (folder, inference):
            if place == folder or os.path.lexists(place):
                with tempfile.TemporaryFile(dir=place) as file:
                    file.write(bytes(_BYTES_TRIED))
    except OSError as error:
        raise LaunchError.of(
            "OUTPUT_DIR",
            "be a folder that can be written to",
            got=repr(folder),
            where=error.strerror or str(error),
            remedy="Give another one: OUTPUT_DIR <folder>.",
        ) from error

    names = ["log.txt", *files, os.path.join("inference", "results.json")]
    try:
        for name in names:
            check_can_write(os.path.join(folder, name))
    except OSError as error:
        refusal = explain_os_error(error)
        raise error if refusal is None else refusal from error

"""What `tools/train_net.py` does between its command line and the trainer: config, checks, workers.

Everything that can be known to be wrong is found here, before workers start.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bnext.config import add_bnext_config, check_config
from bnext.data.check import check_datasets
from bnext.engine.launch import launch
from bnext.engine.trainer import evaluate, train
from bnext.errors import CheckpointError, ConfigError, LaunchError

__all__ = ["build_parser", "check_run", "load_config", "run"]


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's command line; --dist-url is by default a free port of this machine."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    return parser


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file with bnext's keys, and the pairs that override it.

    Args:
        config_file: path; "" for Detectron2's defaults.
        opts: KEY VALUE KEY VALUE ...

    Returns:
        A frozen config whose MODEL.DEVICE this machine has: "cuda" becomes "cpu" where there is none.

    Raises:
        ConfigError: if the file is missing or no YAML, or a key or value is not allowed.
    """
    cfg = get_cfg()
    add_bnext_config(cfg)
    try:
        if config_file:
            cfg.merge_from_file(config_file)
    except (AssertionError, KeyError, ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--config-file must be a YAML file with keys of Detectron2 and bnext; got {_say(error)} ({config_file}). "
            "Correct the path or the key."
        ) from error
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"KEY VALUE pairs must name keys of Detectron2 and bnext, with values of their type; got {_say(error)} "
            f"({' '.join(opts)}). Correct the pair."
        ) from error
    check_config(cfg)
    _choose_device(cfg)
    cfg.freeze()
    return cfg


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check everything, start the workers, and train or evaluate.

    Args:
        cfg: from `load_config`.
        args: of Detectron2's `default_argument_parser`: resume, eval_only, num_gpus, num_machines,
            machine_rank, dist_url, config_file.

    Raises:
        BNextError: what is wrong, before training starts wherever it can be known.
    """
    check_run(cfg, args)
    launch(run_worker, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(cfg, args))


def run_worker(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What every worker does. See `run` for the arguments."""
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bnext")
    if args.eval_only:
        evaluate(cfg, resume=args.resume)
        return
    if not args.resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        logging.getLogger(__name__).warning(
            "OUTPUT_DIR %s holds an earlier training: its checkpoints will be overwritten and metrics.json appended "
            "to. Use --resume to continue it, or another OUTPUT_DIR to keep it.",
            cfg.OUTPUT_DIR,
        )
    train(cfg, resume=args.resume)


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Find what would stop the run: data sets, batch size, weights, output directory.

    Args:
        cfg, args: see `run`.

    Raises:
        ConfigError, DatasetError, CheckpointError, LaunchError: what is wrong.
    """
    if not args.eval_only and not cfg.DATASETS.TRAIN or args.eval_only and not cfg.DATASETS.TEST:
        which = "TEST" if args.eval_only else "TRAIN"
        raise ConfigError(f"DATASETS.{which} must name at least one data set; got none. Name one in the config.")
    num_classes = _count_classes(cfg)
    if not args.eval_only:
        _check_batch_size(cfg, args)
        check_datasets(cfg.DATASETS.TRAIN, num_classes=num_classes)
    check_datasets(cfg.DATASETS.TEST, num_classes=num_classes, training=False)
    _check_weights(cfg, args)
    _check_output(cfg.OUTPUT_DIR)


def _say(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    return text.splitlines()[0] if text else type(error).__name__


def _choose_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    if not device.startswith("cuda") or torch.cuda.is_available():
        return
    if device != "cuda":
        raise LaunchError(
            f"MODEL.DEVICE must be a device of this machine, which has no CUDA; got {device!r}. Set it to 'cpu'."
        )
    logging.getLogger(__name__).info("This machine has no CUDA: MODEL.DEVICE is set to 'cpu'.")
    cfg.MODEL.DEVICE = "cpu"


def _count_classes(cfg: CfgNode) -> int | None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture.endswith(("RetinaNet", "FCOS")):
        return int(cfg.MODEL.RETINANET.NUM_CLASSES)
    return int(cfg.MODEL.ROI_HEADS.NUM_CLASSES) if architecture.endswith("RCNN") else None


def _check_batch_size(cfg: CfgNode, args: argparse.Namespace) -> None:
    num_workers = int(os.environ.get("WORLD_SIZE", max(args.num_gpus, 1) * args.num_machines))
    # With REFERENCE_WORLD_SIZE Detectron2 scales the batch with the workers.
    if cfg.SOLVER.REFERENCE_WORLD_SIZE == 0 and cfg.SOLVER.IMS_PER_BATCH % num_workers:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the {num_workers} workers; got {cfg.SOLVER.IMS_PER_BATCH}. "
            "Change it, or --num-gpus."
        )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    path = cfg.MODEL.WEIGHTS
    is_resumed = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only and not path and not is_resumed:
        raise CheckpointError(
            "MODEL.WEIGHTS must name the checkpoint to evaluate; got ''. "
            "Give MODEL.WEIGHTS <file>, or --resume for the last checkpoint of OUTPUT_DIR."
        )
    if path and "://" not in path and not os.path.isfile(path.split("?")[0]) and not is_resumed:
        raise CheckpointError(
            f"MODEL.WEIGHTS must name a file; got {path!r}, which does not exist. Correct the path, or set it to ''."
        )


def _check_output(folder: str) -> None:
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LaunchError(
            f"OUTPUT_DIR must be a folder that can be written to; got {folder!r} ({error.strerror or error}). "
            "Give another one: OUTPUT_DIR <folder>."
        ) from error

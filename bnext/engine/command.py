"""What `tools/train_net.py` does between its command line and the trainer: config, checks, workers.

Everything that can be known to be wrong is found here, before workers start.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import tempfile
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bnext.config import add_bnext_config
from bnext.config_check import check_config
from bnext.data.check import check_datasets
from bnext.data.sampler import check_batch_size
from bnext.engine.checkpoint import check_eval_weights
from bnext.engine.evaluation import check_evaluator
from bnext.engine.launch import count_workers, launch
from bnext.engine.optimizer import check_optimizer
from bnext.engine.trainer import evaluate, train
from bnext.errors import CheckpointError, ConfigError, LaunchError

__all__ = ["build_parser", "check_run", "load_config", "run"]

# What yacs and detectron2 raise for a file or a pair that has not the form of a config.
_MALFORMED = (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


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
        LaunchError: if this machine does not have MODEL.DEVICE.
    """
    cfg = get_cfg()
    add_bnext_config(cfg)
    _merge(cfg, config_file, opts)
    _check_architecture(cfg.MODEL.META_ARCHITECTURE)
    check_config(cfg)
    check_optimizer(cfg)
    _choose_device(cfg)
    cfg.freeze()
    return cfg


def _merge(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> None:
    options = [word for word in opts[::2] if word.startswith("--")]
    if options:
        raise ConfigError(
            f"Options must come before the KEY VALUE pairs; got {options[0]} among them ({' '.join(opts)}). Move it."
        )
    defaults = cfg.clone()
    try:
        if config_file:
            cfg.merge_from_file(config_file)
            _check_values(cfg, defaults)
    except (*_MALFORMED, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--config-file must be a YAML file with keys of Detectron2 and bnext; got {_say(error)} ({config_file}). "
            "Correct the path or the key."
        ) from error
    try:
        cfg.merge_from_list(list(opts))
        _check_values(cfg, defaults)
    except _MALFORMED as error:
        raise ConfigError(
            f"KEY VALUE pairs must name keys of Detectron2 and bnext, with values of their type; got {_say(error)} "
            f"({' '.join(opts)}). Correct the pair."
        ) from error


def _check_values(cfg: CfgNode, defaults: CfgNode, place: str = "") -> None:
    """Numbers have a value: yacs lets None replace them."""
    for key, default in defaults.items():
        value = cfg.get(key)
        if value is None and isinstance(default, (int, float)):
            raise ValueError(f"no value for {place}{key}")
        if isinstance(default, CfgNode):
            _check_values(value, default, f"{place}{key}.")


def _check_architecture(name: str) -> None:
    known = [registered for registered, _ in META_ARCH_REGISTRY]
    if name in known:
        return
    close = difflib.get_close_matches(str(name), known) or sorted(known)
    raise ConfigError(
        f"MODEL.META_ARCHITECTURE must name a registered architecture; got {name!r} (config). "
        f"Did you mean {' or '.join(close)}? One of your own must be imported first."
    )


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
    launch(run_worker, *_request(args), args=(cfg, args), device=cfg.MODEL.DEVICE)


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
        comm.synchronize()  # every worker has seen the file
        if comm.is_main_process():  # else an interrupted new training would later go on with the old one
            os.remove(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    train(cfg, resume=args.resume)


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Find what would stop the run: workers, batch size, data sets, weights, output directory; the quick checks first.

    Args:
        cfg, args: see `run`.

    Raises:
        ConfigError, DatasetError, CheckpointError, LaunchError: what is wrong.
    """
    num_workers = count_workers(*_request(args), device=cfg.MODEL.DEVICE)
    if not args.eval_only and not cfg.DATASETS.TRAIN or args.eval_only and not cfg.DATASETS.TEST:
        which = "TEST" if args.eval_only else "TRAIN"
        raise ConfigError(f"DATASETS.{which} must name at least one data set; got none. Name one in the config.")
    if not args.eval_only:
        # With REFERENCE_WORLD_SIZE Detectron2 scales the batch from that many workers to those that there are.
        check_batch_size(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers)
    for name in cfg.DATASETS.TEST:
        if name in DatasetCatalog:  # else check_datasets says so
            check_evaluator(name)
    num_classes = _count_classes(cfg)
    if not args.eval_only:
        check_datasets(cfg.DATASETS.TRAIN, num_classes=num_classes)
    check_datasets(cfg.DATASETS.TEST, num_classes=num_classes, training=False)
    _check_weights(cfg, args)
    _check_output(cfg.OUTPUT_DIR)


def _request(args: argparse.Namespace) -> tuple[int, int, int, str]:
    return args.num_gpus, args.num_machines, args.machine_rank, args.dist_url


def _say(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    line = text.splitlines()[0] if text else type(error).__name__
    key = text.rpartition("for config key: ")[2] if "for config key: " in text else ""
    if key not in line:  # yacs shows a whole section before it
        line = f"another type for {key}"
    return f"no mapping of names to values ({line})" if isinstance(error, (AttributeError, TypeError)) else line


def _choose_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"MODEL.DEVICE must be a device of torch; got {device!r} (config). Set it to 'cuda' or 'cpu'."
        ) from error
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


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    path = cfg.MODEL.WEIGHTS
    is_resumed = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only and not is_resumed:
        check_eval_weights(path)
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

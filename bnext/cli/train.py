"""Train or evaluate a config: what stands between the command line and the trainer.

Everything that can be known to be wrong is found here, before workers start.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm

from bnext.checkpoints.checkpointer import check_eval_weights, find_missing_weights
from bnext.checkpoints.last import find_last_checkpoint
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.config import load_config
from bnext.config.differences import describe_differences
from bnext.config.domains import check_domains
from bnext.data.check_classes import check_class_map, check_classes
from bnext.data.check_coco import check_datasets
from bnext.data.classes import count_classes
from bnext.data.domains import check_domain_lists
from bnext.data.listed_sets import register_listed_sets
from bnext.data.records import check_registered
from bnext.data.sampling.build import check_domain_batches
from bnext.data.sampling.samplers import check_batch_size
from bnext.engine.accumulation import check_accumulation
from bnext.engine.best import check_best_metric
from bnext.engine.launch import count_workers, launch
from bnext.engine.optimizer import check_solver
from bnext.engine.output import holding_output
from bnext.engine.own_parts import OwnParts
from bnext.engine.resume import check_output_files
from bnext.engine.screen import only_in_file, set_up_logging
from bnext.engine.trainer import Trainer, check_same_config, evaluate, train
from bnext.engine.wandb_writer import check_wandb
from bnext.errors import ConfigError, LaunchError
from bnext.evaluation.coco import build_evaluator, check_evaluator
from bnext.evaluation.conditions import Conditions, check_conditions
from bnext.evaluation.rehearsal import rehearse
from bnext.files import find_local_file, naming_file, replace_file
from bnext.kernels import find_kernels_fault, use_kernels
from bnext.notices import HeldNotice, holding_notices, log_notices, tell_once

__all__ = ["DESCRIPTION", "add_arguments", "check_run", "execute", "run"]

DESCRIPTION = """Train or evaluate a detector from a config, as Detectron2's train_net.py does.

    bnext train --config-file CONFIG.yaml --num-gpus 2 SOLVER.BASE_LR 0.01
    bnext train --config-file CONFIG.yaml --resume
    bnext train --config-file CONFIG.yaml --eval-only MODEL.WEIGHTS model_final.pth
    torchrun --nproc-per-node 2 -m bnext train --config-file CONFIG.yaml

On a machine without GPUs --num-gpus counts CPU workers."""
KERNELS = "SOLVER.BNEXT.KERNELS"
_BYTES_TRIED = 1 << 16  # a full disk still makes empty files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of Detectron2's train_net; --dist-url is by default a free port of this machine."""
    add = parser.add_argument

    add("--config-file", default="", metavar="FILE", help=f"of the model, the data and the schedule: {FILE_HELP}")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add_launch_arguments(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=f"at the end; {PAIRS_HELP}")


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how many workers there are, and where."""
    add = parser.add_argument
    add("--num-gpus", type=int, default=1, metavar="N", help="workers on this machine (default: %(default)s)")
    add("--num-machines", type=int, default=1, metavar="N", help="machines of this run (default: %(default)s)")
    add("--machine-rank", type=int, default=0, metavar="I", help="of this machine, 0 to N - 1")
    add("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT where machines meet (default: a free port)")


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    run(load_config(args.config_file, args.opts), args)


def run(
    cfg: CfgNode,
    args: argparse.Namespace,
    parts: OwnParts | None = None,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """Check everything, start the workers, and train or evaluate.

    Args:
        cfg: from `load_config`.
        args: of Detectron2's `default_argument_parser`: resume, eval_only, num_gpus, num_machines,
            machine_rank, dist_url, config_file.
        parts: of the training, that are the caller's own.
        conditions: of the evaluation, where nothing is trained; None: those of the file.

    Returns:
        The results of the last evaluation; none on machines but the first.

    Raises:
        BNextError: what is wrong, before training starts wherever it can be known.
    """
    with holding_notices() as notices:
        _check_kernels(cfg)
        check_run(
            cfg,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            eval_only=args.eval_only,
            resume=args.resume,
            trainer=Trainer if parts is None else parts.build_trainer(),
            conditions=conditions,
        )

    with tempfile.TemporaryDirectory(prefix="bnext-results-") as folder:
        file = os.path.join(folder, "results")
        try:
            launch(
                run_worker,
                args.num_gpus,
                args.num_machines,
                args.machine_rank,
                args.dist_url,
                args=(cfg, args, notices, parts, file, conditions),
                device=cfg.MODEL.DEVICE,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("" if args.eval_only else _describe_kept(cfg.OUTPUT_DIR)) from None
        return pickle.loads(Path(file).read_bytes()) if os.path.exists(file) else {}


def _check_kernels(cfg: CfgNode) -> None:
    """Refuse kernels that are not installed; here and not in `check_run`, as other commands do not read the key."""
    fault = find_kernels_fault(cfg.SOLVER.BNEXT.KERNELS, KERNELS)
    if fault is not None:
        raise fault


def _describe_kept(folder: str) -> str:
    if os.path.isfile(os.path.join(folder, "last_checkpoint")):
        return f"--resume goes on from the last checkpoint in {folder}"
    return f"there is no checkpoint in {folder} yet"


def run_worker(
    cfg: CfgNode,
    args: argparse.Namespace,
    notices: Sequence[HeldNotice] = (),
    parts: OwnParts | None = None,
    file: str = "",
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """Train or evaluate in one worker.

    Args:
        cfg, args: see `run`.
        notices: of the checks, which are said here, where there is a log.txt.
        parts: see `run`.
        file: takes the results, on the main process; "": none.
        conditions: see `run`.

    Returns:
        The results of the last evaluation.
    """
    trainer = Trainer if parts is None else parts.build_trainer()
    register_listed_sets(cfg)
    trained = () if args.eval_only else cfg.DATASETS.TRAIN
    for name in (*trained, *cfg.DATASETS.TEST):  # several workers are fresh processes
        check_registered(name)
    check_same_config(cfg)
    _check_kernels(cfg)

    with use_kernels(cfg.SOLVER.BNEXT.KERNELS):
        if args.eval_only:
            _set_up(cfg, args, notices)
            results: dict[str, Any] = evaluate(cfg, args.resume, trainer, conditions)
        else:
            with holding_output(cfg.OUTPUT_DIR):
                _set_up(cfg, args, notices)
                results = _train(cfg, args, trainer)

    if file and comm.is_main_process():
        Path(file).write_bytes(pickle.dumps(results))
    return results


def _set_up(cfg: CfgNode, args: argparse.Namespace, notices: Sequence[HeldNotice]) -> None:
    set_up_logging(cfg.OUTPUT_DIR)
    file = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    kept = None
    if args.eval_only and os.path.isfile(file) and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "metrics.json")):
        kept = Path(file).read_bytes()  # of a training
    with naming_file(file), only_in_file("detectron2"):  # the environment, and the whole config
        default_setup(cfg, args)

    if comm.is_main_process():
        if kept is not None:
            _put_back(file, kept)
            file = os.path.join(cfg.OUTPUT_DIR, "inference", "config.yaml")
        log = logging.getLogger(__name__)
        log.info("%s", describe_differences(cfg, args.config_file, args.opts[::2]))
        place = "beside it" if kept is None else f"in {cfg.OUTPUT_DIR}"
        log.info("The whole config is in %s, everything that is logged in log.txt %s.", file, place)
        log_notices(notices)
        if cfg.SOLVER.BNEXT.KERNELS == "triton" and (cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available()):
            tell_once(log, KERNELS, "%s is 'triton', which is as 'torch' without a GPU.", KERNELS)


def _put_back(file: str, kept: bytes) -> None:
    """The config of a training again, where detectron2 has written that of an evaluation, which goes to inference/."""
    folder = os.path.join(os.path.dirname(file), "inference")
    os.makedirs(folder, exist_ok=True)
    evaluated = Path(file).read_bytes()
    replace_file(file, lambda output: output.write(kept))
    replace_file(os.path.join(folder, "config.yaml"), lambda output: output.write(evaluated))


def _train(cfg: CfgNode, args: argparse.Namespace, trainer: type[Trainer]) -> dict[str, Any]:
    if not args.resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        logging.getLogger(__name__).warning(
            "OUTPUT_DIR %s holds an earlier training: its checkpoints will be overwritten and metrics.json appended "
            "to; what this training does not write, such as model_best.pth or model_ema.pth, stays that of the earlier "
            "one. Use --resume to continue it, or another OUTPUT_DIR to keep it.",
            cfg.OUTPUT_DIR,
        )
        comm.synchronize()  # every worker has seen the file
        if comm.is_main_process():  # else an interrupted new training would later go on with the old one
            os.remove(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))

    return train(cfg, args.resume, trainer)


def check_run(
    cfg: CfgNode,
    num_gpus: int = 1,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    eval_only: bool = False,
    resume: bool = False,
    trainer: type[Trainer] = Trainer,
    conditions: Conditions | None = None,
) -> None:
    """Find what would stop the run; quick checks first, and last the evaluation tried with ground truth.

    Args:
        cfg: from `load_config`.
        num_gpus, num_machines, machine_rank, dist_url, eval_only, resume: options of Detectron2's command line.
        trainer: whose evaluators are tried.
        conditions: see `run`.

    Raises:
        ConfigError, DatasetError, CheckpointError, LaunchError: what is wrong.
    """
    register_listed_sets(cfg)
    num_workers = count_workers(num_gpus, num_machines, machine_rank, dist_url, device=cfg.MODEL.DEVICE)

    which = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[which]:
        raise ConfigError.of(
            f"DATASETS.{which}", "name at least one data set", got="none", remedy="Name one in the config."
        )
    if not eval_only:
        # With REFERENCE_WORLD_SIZE Detectron2 scales the batch from that many workers to those that there are.
        check_batch_size(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers)
        check_solver(cfg)
        check_accumulation(cfg, cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers)
        check_wandb(cfg)

    evaluates = getattr(trainer.test, "__func__", None) is getattr(Trainer.test, "__func__", None)
    is_known = evaluates and trainer.build_evaluator is build_evaluator
    for name in cfg.DATASETS.TEST if is_known else ():
        if name in DatasetCatalog:  # else check_datasets says so
            check_evaluator(name)

    check_domain_lists(cfg)
    _, num_classes = count_classes(cfg) or ("", None)
    if not eval_only:
        check_datasets(cfg.DATASETS.TRAIN, num_classes=num_classes, cfg=cfg)
        check_classes(cfg, is_new=not resume)
        check_domain_batches(cfg)
    else:
        check_class_map(cfg)
    check_datasets(cfg.DATASETS.TEST, num_classes=num_classes, training=False, cfg=cfg)

    conditions = conditions or Conditions()
    check_domains(cfg, eval_only=eval_only, domain=conditions.domain)
    check_conditions(cfg, conditions)

    _check_weights(cfg, eval_only=eval_only, resume=resume)
    _check_output(cfg.OUTPUT_DIR)
    check_output_files(cfg.OUTPUT_DIR, training=not eval_only)
    if evaluates:
        rehearse(cfg, build=trainer.build_evaluator)
    if is_known and not eval_only:
        check_best_metric(cfg)


def _check_weights(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    if resume and find_last_checkpoint(cfg.OUTPUT_DIR):
        return  # they are not read

    if eval_only:
        check_eval_weights(cfg.MODEL.WEIGHTS)
        missing = find_missing_weights(cfg.MODEL.WEIGHTS)
    else:
        missing = find_missing_weights(cfg.MODEL.WEIGHTS, "Correct the path, or set it to ''.")
    if missing is not None:
        raise missing


def _check_output(folder: str) -> None:
    """OUTPUT_DIR takes files, also those of evaluations."""
    if find_local_file(folder) is None:
        return

    inference = os.path.join(folder, "inference")
    try:
        os.makedirs(folder, exist_ok=True)
        for place in (folder, inference):
            if place == folder or os.path.isdir(place):
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

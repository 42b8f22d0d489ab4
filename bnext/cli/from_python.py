"""The commands `train` and `evaluate` as functions, with parts of the caller's own: for scripts and notebooks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from bnext.cli.start import is_spawned
from bnext.cli.train import run, run_worker
from bnext.config.load import finish_config
from bnext.data.mapping import Mapper
from bnext.engine.own_parts import OwnParts
from bnext.engine.trainer import Trainer
from bnext.errors import ConfigError, LaunchError, Refusal
from bnext.evaluation.conditions import Conditions

__all__ = ["evaluate", "train"]

UNGUARDED = Refusal(
    LaunchError,
    "A training",
    "be started by the program alone, not by the fresh processes that it starts",
    "Put the call under `if __name__ == '__main__':`.",
)


def train(
    cfg: CfgNode,
    *,
    mapper: Mapper | None = None,
    hooks: Sequence[HookBase | Callable[[CfgNode], HookBase]] = (),
    writers: Sequence[EventWriter] | Callable[[CfgNode], Sequence[EventWriter]] | None = None,
    evaluator: DatasetEvaluator | Callable[..., DatasetEvaluator] | None = None,
    trainer: type[Trainer] | None = None,
    resume: bool = False,
    num_gpus: int = 1,
) -> dict[str, Any]:
    """Check, train and evaluate a config, as `bnext train` does.

    Args:
        cfg: from `bnext.load_config(file, opts)`, or any with bnext's keys; it is left as it is.
        mapper: turns a training record into the model's input, e.g. a DatasetMapper with augmentations of yours. Its
            random numbers come from `random`, `numpy.random` and torch, which are seeded for each image.
        hooks: besides those of bnext; each a HookBase, or a function of the config that makes one.
        writers: besides those of bnext; EventWriters, or a function of the config that makes some.
        evaluator: a DatasetEvaluator, or a function of the config and a data set's name that makes one.
        trainer: a subclass of `bnext.engine.Trainer`, for everything else.
        resume: go on from the last checkpoint of OUTPUT_DIR, exactly.
        num_gpus: workers on this machine; CPU workers where there is no GPU. Each of several is a fresh process, which
            imports the script anew: the call belongs under `if __name__ == "__main__":`, and what is defined and
            registered above it. Under torchrun, and within `launch`, this process is one of the workers.

    Returns:
        The results of the last evaluation, as `evaluate_model` gives them; none on workers but the first.

    Raises:
        BNextError: what is wrong, before training starts wherever it can be known.

    Example:
        >>> cfg = bnext.load_config("retinanet.yaml")  # doctest: +SKIP
        >>> bnext.train(cfg, mapper=DatasetMapper(cfg, True, augmentations=[RandomFlip()]))  # doctest: +SKIP
    """
    parts = OwnParts(mapper=mapper, hooks=hooks, writers=writers, evaluator=evaluator, trainer=trainer)
    return _run(cfg, parts, resume, num_gpus, False)


def evaluate(
    cfg: CfgNode,
    *,
    evaluator: DatasetEvaluator | Callable[..., DatasetEvaluator] | None = None,
    trainer: type[Trainer] | None = None,
    num_gpus: int = 1,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS on every set of DATASETS.TEST, as `bnext evaluate` does.

    Args:
        cfg, evaluator, trainer, num_gpus: see `train`.
        conditions: other statistics than those of the file, another domain; what the results are compared with.

    Returns:
        See `evaluate_model`.

    Raises:
        BNextError: what is wrong.
    """
    return _run(cfg, OwnParts(evaluator=evaluator, trainer=trainer), False, num_gpus, True, conditions)


def _run(
    cfg: CfgNode,
    parts: OwnParts,
    resume: bool,
    num_gpus: int,
    eval_only: bool,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    if not isinstance(cfg, CfgNode):
        is_file = isinstance(cfg, (str, os.PathLike))
        remedy = f"Write bnext.load_config({str(cfg)!r})." if is_file else "Take what bnext.load_config gives."
        raise ConfigError.of("cfg", "be a config", got=repr(cfg), remedy=remedy)

    if is_spawned():
        raise UNGUARDED.of("a call in a process that only imports the script")

    args = argparse.Namespace(config_file="", opts=[], resume=resume, eval_only=eval_only, num_gpus=num_gpus)
    args.num_machines, args.machine_rank, args.dist_url = 1, 0, "auto"
    cfg = finish_config(cfg)
    if comm.get_world_size() == 1:
        return run(cfg, args, parts, conditions)
    return run_worker(cfg, args, parts=parts, conditions=conditions)

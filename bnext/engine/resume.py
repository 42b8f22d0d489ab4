"""What a checkpoint holds of a training beside weights and optimizer, so that a resume is exact, or says why not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from bnext.errors import CheckpointError

__all__ = [
    "collect_training",
    "compare_training",
    "expect_same_optimizer",
    "read_normalizers",
    "read_training_keys",
    "write_normalizers",
]

# What the images and the steps depend on, without the keys whose change is told apart or changes nothing.
_NODES = ("SOLVER", "DATASETS", "DATALOADER", "INPUT", "MODEL")
_NO_INFLUENCE = ("WEIGHTS", "DEVICE", "INFERENCE")
_NO_INFLUENCE += ("IMS_PER_BATCH", "OPTIMIZER", "CHECKPOINT_PERIOD", "REFERENCE_WORLD_SIZE", "NUM_WORKERS")
# These are in the state of optimizer and scheduler, so that the checkpoint's values stay in force.
_IN_OPTIMIZER = ("BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV")
_IN_OPTIMIZER += ("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS")
_NORMALIZER = "loss_normalizer"  # a moving average that dense detectors keep as a plain attribute


def read_normalizers(model: nn.Module) -> dict[str, float]:
    """Path -> moving average of the foreground anchors, which no state dict holds."""
    found = {path: vars(module).get(_NORMALIZER) for path, module in model.named_modules()}
    return {path: float(value) for path, value in found.items() if isinstance(value, (int, float))}


def write_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Set what `read_normalizers` read."""
    for path, value in values.items():
        setattr(model.get_submodule(path), _NORMALIZER, value)


def collect_training(cfg: CfgNode, seed: int, workers: list[dict[str, float]]) -> dict[str, Any]:
    """What an exact resume depends on, as plain values.

    Args:
        cfg: of the training.
        seed: of the training.
        workers: the normalizers of each worker, see `read_normalizers`.
    """
    return {
        "seed": seed,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "optimizer": cfg.SOLVER.OPTIMIZER,
        "workers": workers,
        "config": read_training_keys(cfg),
    }


def read_training_keys(cfg: CfgNode) -> dict[str, Any]:
    """Key -> value of the config's solver and training data; lists for tuples, as files do not tell them apart."""
    keys: dict[str, Any] = {}
    for name in _NODES:
        keys.update(_flatten(cfg[name], name))
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        del keys["SOLVER.MAX_ITER"]  # a longer training with steps is the same so far
    return {key: value for key, value in keys.items() if not _has_no_influence(key)}


def _flatten(node: CfgNode, prefix: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, value in node.items():
        own = f"{prefix}.{name}"
        keys.update(_flatten(value, own) if isinstance(value, CfgNode) else {own: _listed(value)})
    return keys


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _has_no_influence(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name in _NO_INFLUENCE or "TEST" in name


@contextlib.contextmanager
def expect_same_optimizer(cfg: CfgNode, state: dict[str, Any]) -> Iterator[None]:
    """Say what is wrong where the optimizer's state in a checkpoint is not one of this training's optimizer.

    Args:
        cfg: of the training that resumes.
        state: the trainer's state dict in the checkpoint.

    Raises:
        CheckpointError: another optimizer, or other parameters.
    """
    now = cfg.SOLVER.OPTIMIZER
    before = (state.get("bnext") or {}).get("optimizer", now)
    try:
        if before != now:
            raise ValueError(f"SOLVER.OPTIMIZER is {now}, it was {before}")
        yield
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"The optimizer of the resumed training must be that of the checkpoint; got another ({error}; "
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}). Resume with the config of the training, or start another with "
            f"MODEL.WEIGHTS <file> and another OUTPUT_DIR."
        ) from error


def compare_training(cfg: CfgNode, seed: int, state: dict[str, Any]) -> dict[str, Any] | None:
    """Log in what a resumed training differs from the one of a checkpoint.

    Args:
        cfg: of the training that resumes.
        seed: its seed so far.
        state: the trainer's state dict in the checkpoint.

    Returns:
        What `collect_training` gave when it was saved; None for a checkpoint of detectron2.
    """
    own = state.get("bnext")
    if own is None:
        what = "it has" if "_trainer" in state else "it lacks the optimizer and has"
        _tell_inexact(f"the checkpoint was not written by bnext, {what} no seed")
        return None
    if own["seed"] != seed:
        logging.getLogger(__name__).info("The resumed training keeps its seed %d.", own["seed"])
    workers, batch = own["workers"], cfg.SOLVER.IMS_PER_BATCH
    if len(workers) != comm.get_world_size():
        _tell_inexact(f"{comm.get_world_size()} worker(s) now, the state of {len(workers)} in the checkpoint")
    if own["total_batch_size"] != batch:
        _tell_inexact(f"SOLVER.IMS_PER_BATCH is {batch}, it was {own['total_batch_size']}")
    _compare_keys(own.get("config"), read_training_keys(cfg))
    return own


def _compare_keys(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    if before is None:
        logging.getLogger(__name__).info(
            "The checkpoint does not say with which solver and data it was trained: a change would not be seen."
        )
        return
    for key in sorted(before.keys() & now.keys()):
        if before[key] == now[key]:
            continue
        if key in [f"SOLVER.{name}" for name in _IN_OPTIMIZER]:
            logging.getLogger(__name__).warning(
                "The resume keeps %s %s, which is in the optimizer of the checkpoint; the config's %s has no effect.",
                key,
                before[key],
                now[key],
            )
        else:
            _tell_inexact(f"{key} is {now[key]}, it was {before[key]}")


def _tell_inexact(reason: str) -> None:
    logging.getLogger(__name__).warning("The resume is not exact: %s.", reason)

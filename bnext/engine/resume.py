"""All that a checkpoint holds of a training beside weights and optimizer: a resume is exact, or says why not."""

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

_LOGGER = logging.getLogger(__name__)
# What the images and the steps depend on, without the keys whose change is told apart or changes nothing.
_NODES = ("SOLVER", "DATASETS", "DATALOADER", "INPUT", "MODEL")
_NO_INFLUENCE = {"WEIGHTS", "DEVICE", "INFERENCE", "IMS_PER_BATCH", "OPTIMIZER", "CHECKPOINT_PERIOD"}
_NO_INFLUENCE |= {"REFERENCE_WORLD_SIZE", "NUM_WORKERS"}
# These are in the state of optimizer and scheduler, so that the checkpoint's values stay in force.
_IN_OPTIMIZER = {"SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV"}
_IN_OPTIMIZER |= {"SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"}
_NORMALIZER = "loss_normalizer"  # a moving average that dense detectors keep as a plain attribute


def read_normalizers(model: nn.Module) -> dict[str, float]:
    """Path -> moving average of the foreground anchors, which no state dict holds."""
    normalizers = {}
    for path, module in model.named_modules():
        value = vars(module).get(_NORMALIZER)
        if isinstance(value, (int, float)):
            normalizers[path] = float(value)
    return normalizers


def write_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Set what `read_normalizers` read."""
    for path, value in values.items():
        setattr(model.get_submodule(path), _NORMALIZER, value)


def collect_training(cfg: CfgNode, seed: int, workers: list[dict[str, float]]) -> dict[str, Any]:
    """Plain values of all that an exact resume depends on.

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
    keys = {}
    for name in _NODES:
        keys.update(_flatten(cfg[name], name))

    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        del keys["SOLVER.MAX_ITER"]  # a longer training with steps is the same so far
    return keys


def _flatten(node: CfgNode, prefix: str) -> dict[str, Any]:
    keys = {}
    for name, value in node.items():
        key = f"{prefix}.{name}"
        if isinstance(value, CfgNode):
            keys.update(_flatten(value, key))
        elif name not in _NO_INFLUENCE and "TEST" not in name:
            keys[key] = _as_lists(value)
    return keys


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


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
        raise CheckpointError.of(
            "The optimizer of the resumed training",
            "be that of the checkpoint",
            got="another",
            where=f"{error}; OUTPUT_DIR {cfg.OUTPUT_DIR}",
            remedy="Resume with the config of the training, or start another with MODEL.WEIGHTS <file> and another "
            "OUTPUT_DIR.",
        ) from error


def compare_training(cfg: CfgNode, seed: int, state: dict[str, Any]) -> dict[str, Any] | None:
    """Log in what a resumed training differs from the one of a checkpoint.

    Args:
        cfg: of the training that resumes.
        seed: its seed so far.
        state: the trainer's state dict in the checkpoint.

    Returns:
        The value of `collect_training` when it was saved; None for a checkpoint of detectron2.
    """
    training = state.get("bnext")
    if training is None:
        lacking = "it has" if "_trainer" in state else "it lacks the optimizer and has"
        _warn_inexact(f"the checkpoint was not written by bnext, {lacking} no seed")
        return None

    if training["seed"] != seed:
        _LOGGER.info("The resumed training keeps its seed %d.", training["seed"])

    num_workers, num_states = comm.get_world_size(), len(training["workers"])
    if num_workers != num_states:
        _warn_inexact(f"{num_workers} worker(s) now, the state of {num_states} in the checkpoint")

    batch, former_batch = cfg.SOLVER.IMS_PER_BATCH, training["total_batch_size"]
    if batch != former_batch:
        _warn_inexact(f"SOLVER.IMS_PER_BATCH is {batch}, it was {former_batch}")

    if "config" in training:
        _compare_keys(training["config"], read_training_keys(cfg))
    else:
        _LOGGER.info(
            "The checkpoint does not say with which solver and data it was trained: a change would not be seen."
        )
    return training


def _compare_keys(before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted(before.keys() & now.keys()):
        if before[key] == now[key]:
            continue

        if key in _IN_OPTIMIZER:
            _LOGGER.warning(
                "The resume keeps %s %s, which is in the optimizer of the checkpoint; the config's %s has no effect.",
                key,
                before[key],
                now[key],
            )
        else:
            _warn_inexact(f"{key} is {now[key]}, it was {before[key]}")


def _warn_inexact(reason: str) -> None:
    _LOGGER.warning("The resume is not exact: %s.", reason)

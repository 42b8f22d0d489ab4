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

__all__ = ["collect_training", "compare_training", "expect_same_optimizer", "read_normalizers", "write_normalizers"]

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
    }


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
    return own


def _tell_inexact(reason: str) -> None:
    logging.getLogger(__name__).warning("The resume is not exact: %s.", reason)

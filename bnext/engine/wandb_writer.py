"""Metrics of a training in Weights & Biases, by a switch. Nothing else of bnext knows of it.

Where a run is stored and under whose name is said by W&B's own environment variables (WANDB_API_KEY, WANDB_ENTITY,
WANDB_MODE, WANDB_BASE_URL ...).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter

from bnext.config.check import flatten
from bnext.engine.metrics_file import list_latest
from bnext.errors import ConfigError, LaunchError, Refusal
from bnext.files import find_local_file, replace_file

__all__ = ["ScalarWriter", "build_wandb_writers", "check_wandb"]

KEY = "SOLVER.BNEXT.WANDB.ENABLED"
ID_FILE = "wandb_run_id.txt"
NOT_INSTALLED = Refusal(
    ConfigError,
    KEY,
    "be False where wandb is not installed",
    "Install it: pip install wandb, or take the key away: TensorBoard has the same metrics.",
)
NOT_REACHED = Refusal(
    LaunchError,
    "Weights & Biases",
    "begin a run",
    "Log in with `wandb login`, set WANDB_MODE=offline to send it later, or set SOLVER.BNEXT.WANDB.ENABLED to False.",
)


class ScalarWriter(EventWriter):
    """Hands the scalars of a training on, all of an iteration together, in the order of iterations.

    Args:
        log: called as log({name: value}, iteration); values are finite.
        close: called when the training is over.
        window: iterations over which smoothed metrics are medians.
    """

    def __init__(
        self, log: Callable[[dict[str, float], int], object], close: Callable[[], object], window: int = 20
    ) -> None:
        self._log = log
        self._close = close
        self._window = window
        self._last_write = -1

    def write(self) -> None:
        for iteration, metrics in sorted(list_latest(self._last_write, self._window).items()):
            finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            if finite:
                self._log(finite, iteration)
                self._last_write = iteration

    def close(self) -> None:
        self._close()


def check_wandb(cfg: CfgNode) -> None:
    """Refuse a training that is to be in Weights & Biases where wandb is missing.

    Args:
        cfg: SOLVER.BNEXT.WANDB.ENABLED is read.

    Raises:
        ConfigError: with the line that installs it.
    """
    if not cfg.SOLVER.BNEXT.WANDB.ENABLED:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder of that name, where wandb keeps its runs, has no origin
        raise NOT_INSTALLED.of(True, "config")


def build_wandb_writers(cfg: CfgNode, start_iter: int) -> list[EventWriter]:
    """The writer that SOLVER.BNEXT.WANDB.ENABLED asks for, if it does; it begins a run, or goes on with it.

    Args:
        cfg: SOLVER.BNEXT.WANDB is read; the run shows the whole config.
        start_iter: of this training; above 0 it goes on with the run whose id OUTPUT_DIR holds.

    Raises:
        ConfigError: see `check_wandb`.
        LaunchError: wandb cannot begin a run.
    """
    node = cfg.SOLVER.BNEXT.WANDB
    check_wandb(cfg)
    if not node.ENABLED:
        return []

    import wandb

    former = _read_id(cfg.OUTPUT_DIR) if start_iter > 0 else None
    options: dict[str, Any] = {"id": former, "resume": "allow"} if former else {}
    try:
        run = wandb.init(
            project=node.PROJECT or None,
            name=node.NAME or None,
            dir=find_local_file(cfg.OUTPUT_DIR),
            config=flatten(cfg),
            **options,
        )
    except wandb.errors.Error as error:
        raise NOT_REACHED.of(f"{type(error).__name__}: {error}") from error

    _write_id(cfg.OUTPUT_DIR, run.id)
    return [ScalarWriter(lambda scalars, iteration: run.log(scalars, step=iteration), run.finish)]


def _read_id(folder: str) -> str | None:
    path = os.path.join(folder, ID_FILE)
    if find_local_file(folder) is None or not os.path.isfile(path):
        return None
    with open(path) as file:
        return file.read().strip() or None


def _write_id(folder: str, run_id: str) -> None:
    if find_local_file(folder) is not None:
        replace_file(os.path.join(folder, ID_FILE), lambda file: file.write(f"{run_id}\n".encode()))

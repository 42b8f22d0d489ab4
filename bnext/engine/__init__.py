"""Training and evaluation: the trainer, its hooks, checkpoints, evaluation, and how workers start."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.engine.checkpoint import Checkpointer
from bnext.engine.command import build_parser, load_config, run
from bnext.engine.evaluation import build_evaluator, evaluate_model
from bnext.engine.launch import launch
from bnext.engine.trainer import Trainer, evaluate, train

__all__ = [
    "Checkpointer",
    "Trainer",
    "build_evaluator",
    "build_parser",
    "evaluate",
    "evaluate_model",
    "launch",
    "load_config",
    "run",
    "train",
]

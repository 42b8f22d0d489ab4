"""Training and evaluation: the trainer, its hooks, checkpoints, evaluation, and how workers start."""

from bnext.engine.checkpoint import Checkpointer
from bnext.engine.command import load_config, run
from bnext.engine.evaluation import build_evaluator, evaluate_model
from bnext.engine.launch import launch
from bnext.engine.trainer import Trainer, evaluate, train

__all__ = [
    "Checkpointer",
    "Trainer",
    "build_evaluator",
    "evaluate",
    "evaluate_model",
    "launch",
    "load_config",
    "run",
    "train",
]

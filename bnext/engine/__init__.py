"""A training: the trainer, its hooks, its optimizer, its exact resume, and how workers start."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.engine.launch import launch
from bnext.engine.trainer import Trainer, evaluate, train

__all__ = ["Trainer", "evaluate", "launch", "train"]

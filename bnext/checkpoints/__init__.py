"""Checkpoints read, checked, converted and written."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.checkpoints.checkpointer import Checkpointer, load_model

__all__ = ["Checkpointer", "load_model"]

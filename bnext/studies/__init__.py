"""Shared by experiments: the runner of their rows, and pictures."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2

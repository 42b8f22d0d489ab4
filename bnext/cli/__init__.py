"""Commands: each tool parses and calls one function of this room."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.cli.run_command import run_command
from bnext.cli.train import build_parser, run

__all__ = ["build_parser", "run", "run_command"]

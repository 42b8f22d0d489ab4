#!/usr/bin/env python
"""Train or evaluate a detector from a config: `bnext train`, with the options of Detectron2's train_net.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bnext.cli.main import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a mistake that the user can mend, or 130 after Ctrl-C."""
    return run_tool("train", argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Parity, waits and speed of the norms on this machine's GPU: `bnext check-gpu`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bnext.cli.main import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 where a number is wrong, or 2 without a GPU."""
    return run_tool("check-gpu", argv)


if __name__ == "__main__":
    sys.exit(main())

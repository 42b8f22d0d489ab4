#!/usr/bin/env python
"""The main job in five minutes: a BN in a RetinaNet head fails, and is repaired without training.

    python tools/demo.py

Trains a plain BN in the shared head on the digits set (made on first use), re-estimates its population statistics for
each level, and writes output/demo/results.json and output/demo/detections.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import start  # noqa: F401  before all that takes time

from bnext.cli.arguments import parse_arguments
from bnext.cli.demo import run_demo
from bnext.cli.run_command import run_command

CONFIGS = Path(__file__).parents[1] / "configs/Digits-Detection"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a mistake that the user can mend, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", help="folder for the results (default: %(default)s)")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs that override the config")
    args = parse_arguments(parser, argv)
    trained, repaired = CONFIGS / "retinanet_R_18_FPN_BN.yaml", CONFIGS / "retinanet_R_18_FPN.yaml"
    return run_command(lambda: run_demo(str(trained), str(repaired), args.output, args.opts))


if __name__ == "__main__":
    sys.exit(main())

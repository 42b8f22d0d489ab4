#!/usr/bin/env python
"""Train or evaluate a detector from a config, as Detectron2's train_net.py does.

    python tools/train_net.py --config-file configs/<name>.yaml --num-gpus 2 SOLVER.BASE_LR 0.01
    python tools/train_net.py --config-file configs/<name>.yaml --eval-only MODEL.WEIGHTS model_final.pth
    torchrun --nproc-per-node 2 tools/train_net.py --config-file configs/<name>.yaml

On a machine without GPUs --num-gpus counts CPU workers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import start  # noqa: F401  before all that takes time

from bnext.cli.arguments import parse_arguments
from bnext.cli.run_command import run_command
from bnext.cli.train import build_parser, run
from bnext.config import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a mistake that the user can mend, or 130 after Ctrl-C."""
    args = parse_arguments(build_parser(), argv)
    return run_command(lambda: run(load_config(args.config_file, args.opts), args))


if __name__ == "__main__":
    sys.exit(main())

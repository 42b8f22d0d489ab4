"""Evaluate a checkpoint: `train --eval-only` under a name of its own."""

from __future__ import annotations

import argparse

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.train import add_launch_arguments, run
from bnext.config import load_config

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """COCO AP of a checkpoint on every set of DATASETS.TEST.

    bnext evaluate --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth
    bnext evaluate --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth DATASETS.TEST "('my_val',)"

On a machine without GPUs --num-gpus counts CPU workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}"
    )
    add_launch_arguments(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=f"at the end; {PAIRS_HELP}")
    parser.set_defaults(resume=False, eval_only=True)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    run(load_config(args.config_file, args.opts), args)

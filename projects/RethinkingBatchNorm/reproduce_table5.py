#!/usr/bin/env python
"""Reproduce Table 5 of *Rethinking "Batch" in BatchNorm*: six ways of BN in a shared RetinaNet head.

    python projects/RethinkingBatchNorm/reproduce_table5.py --dataset digits
    python projects/RethinkingBatchNorm/reproduce_table5.py --dataset coco --num-gpus 8 --rows 1 3 4

Rows 1, 3 and 5 are trained; 2, 4 and 6 are their checkpoints, re-estimated per level. A row that another
one is made from is added.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from table5 import TRAINED_ROW, load_rows, order_rows, run_rows

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.engine.launch import launch

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", "coco"), required=True)
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(TRAINED_ROW), default=sorted(TRAINED_ROW))
    parser.add_argument("--output", help="folder for the results (default: output/table5_DATASET)")
    parser.add_argument("--num-gpus", type=int, default=1, help="workers; on a machine without GPUs, CPU workers")
    parser.add_argument("--resume", action="store_true", help="keep finished trainings, go on with unfinished ones")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    args = parser.parse_args(argv)

    return run_command(lambda: reproduce(args))


def reproduce(args: argparse.Namespace) -> None:
    """Prepare the data, check everything, and run the rows in all workers."""
    output = args.output or f"output/table5_{args.dataset}"
    files = {row: str(CONFIGS / args.dataset / f"table5_row{row}.yaml") for row in order_rows(args.rows)}

    if args.dataset == "digits":
        ensure_digits()
    configs = load_rows(files, output, args.opts, num_workers=args.num_gpus)
    device = next(iter(configs.values())).MODEL.DEVICE
    launch(run_rows, args.num_gpus, args=(configs, output, args.dataset, args.resume), device=device)


if __name__ == "__main__":
    sys.exit(main())

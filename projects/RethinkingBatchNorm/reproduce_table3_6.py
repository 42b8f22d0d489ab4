#!/usr/bin/env python
"""Reproduce Tables 3 and 6 of *Rethinking "Batch" in BatchNorm*: BN in the box and mask heads of Mask R-CNN.

    python projects/RethinkingBatchNorm/reproduce_table3_6.py --dataset digits
    python projects/RethinkingBatchNorm/reproduce_table3_6.py --dataset coco --num-gpus 8 --rows bn_2 bn_2_mini_batch

Rows that differ in training are trained; bn_*_mini_batch (statistics of the RoIs of one image at test) and
bn_1_top_scored (population statistics of the RoIs that score highest, not of those that SGD samples) are the
checkpoints of bn_*. A row that another one is made from is added. By default the rows with one image per worker and
SyncBN run: three trainings, on digits under 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from table3_6 import DEFAULT_ROWS, ROWS, check_names, load_rows, order_rows, run_rows

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.engine.launch import launch

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", "coco"), required=True)
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=DEFAULT_ROWS, help=f"of {', '.join(ROWS)}")
    parser.add_argument("--output", help="folder for the results (default: output/table3_6_DATASET)")
    parser.add_argument("--num-gpus", type=int, help="workers (default: 2 for digits, 8 for coco); CPU workers, too")
    parser.add_argument("--resume", action="store_true", help="keep finished trainings, go on with unfinished ones")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    args = parser.parse_args(argv)

    return run_command(lambda: reproduce(args))


def reproduce(args: argparse.Namespace) -> None:
    """Prepare the data, check everything, and run the rows in all workers."""
    check_names(args.rows)
    output = args.output or f"output/table3_6_{args.dataset}"
    num_workers = {"digits": 2, "coco": 8}[args.dataset] if args.num_gpus is None else args.num_gpus
    folder = CONFIGS / args.dataset
    files = {row: str(folder / f"table3_6_{ROWS[row].trained}.yaml") for row in order_rows(args.rows)}

    if args.dataset == "digits":
        ensure_digits()
    configs = load_rows(files, output, args.opts, num_workers)
    device = next(iter(configs.values())).MODEL.DEVICE
    launch(run_rows, num_workers, args=(configs, output, args.dataset, args.resume), device=device)


if __name__ == "__main__":
    sys.exit(main())

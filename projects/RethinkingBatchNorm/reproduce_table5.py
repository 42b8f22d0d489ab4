#!/usr/bin/env python
"""Reproduce Table 5 of *Rethinking "Batch" in BatchNorm*: six ways of BN in a shared RetinaNet head.

    python projects/RethinkingBatchNorm/reproduce_table5.py --dataset digits
    python projects/RethinkingBatchNorm/reproduce_table5.py --dataset digits --rows 1 2 3 4 --seeds 3
    python projects/RethinkingBatchNorm/reproduce_table5.py --dataset coco --num-gpus 8 --rows 1 3 4

Rows 1, 3 and 5 are trained; 2, 4 and 6 are their checkpoints, re-estimated per level. A row that another
one is made from is added.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from table5 import TRAINED_ROW, format_table, list_trainings, load_rows, run_rows

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.engine.launch import launch
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("digits", "coco"), default="digits")
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(TRAINED_ROW), default=sorted(TRAINED_ROW))
    parser.add_argument("--num-gpus", type=int, default=1, help="workers; on a machine without GPUs, CPU workers")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    add_study_arguments(parser, "output/table5_DATASET", num_seeds=1)
    args = parse_study(parser, argv)

    return run_command(lambda: reproduce(args))


def reproduce(args: argparse.Namespace) -> None:
    """Prepare the data, check everything, and run the rows in all workers."""
    if args.show:
        show_results(args.show, partial(format_table, title=args.dataset))
        return

    output = args.output.replace("DATASET", args.dataset)
    if args.dataset == "digits":
        ensure_digits()
    trainings = list_trainings(args.rows, args.seeds)
    configs = load_rows(str(CONFIGS / args.dataset), output, trainings, args.opts, args.num_gpus)
    device = next(iter(configs.values())).MODEL.DEVICE
    launch(run_rows, args.num_gpus, args=(configs, output, args.dataset, args.resume), device=device)


if __name__ == "__main__":
    sys.exit(main())

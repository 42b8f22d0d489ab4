#!/usr/bin/env python
"""One detector for several domains: whose statistics, whose affine, and when to adapt.

    python projects/Domains/run_study.py
    python projects/Domains/run_study.py --seeds 1 --opts SOLVER.MAX_ITER 200    # a quick look

The whole takes hours on two cores; --resume goes on with what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import domain_table
from domain_table import list_trainings, load_configs

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.engine.launch import launch
from bnext.studies.runner import run_study

CONFIG = Path(__file__).parent / "configs" / "three_domains.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="output/domains", help="folder for the results (default: %(default)s)")
    parser.add_argument("--num-gpus", type=int, default=1, help="workers; on a machine without GPUs, CPU workers")
    parser.add_argument("--resume", action="store_true", help="keep finished trainings, go on with unfinished ones")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    args = parser.parse_args(argv)

    return run_command(lambda: run_table(args))


def run_table(args: argparse.Namespace) -> None:
    """Prepare the data, check everything, and run the rows in all workers."""
    ensure_digits()
    configs = load_configs(str(CONFIG), args.output, list_trainings(args.seeds), args.opts, args.num_gpus)
    device = next(iter(configs.values())).MODEL.DEVICE
    launch(run_rows, args.num_gpus, args=(configs, args.output, args.resume), device=device)


def run_rows(configs: dict, output: str, resume: bool) -> None:
    """The rows in one worker."""
    run_study(
        configs,
        output,
        domain_table.run,
        domain_table.describe,
        domain_table.format_table,
        tasks=domain_table.DOMAINS,
        resume=resume,
    )


if __name__ == "__main__":
    sys.exit(main())

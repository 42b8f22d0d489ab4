#!/usr/bin/env python
"""Moving averages and re-estimations compared: sections 3 and 4 of *Rethinking "Batch" in BatchNorm* on digits.

    python projects/PopulationStatistics/run_study.py
    python projects/PopulationStatistics/run_study.py --parts nbs --sizes 8 4 2 --output output/sizes

training: checkpoints along a training, with their moving average and with statistics re-estimated on N images.
nbs: one training for each normalization batch size; how much is noise, generalization gap, train-test inconsistency.
Both take about a quarter of an hour on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from population_study import PARTS, SAMPLES, SIZES, load_rows, run_rows

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=(8, 2), help="normalization batch sizes")
    parser.add_argument("--samples", nargs="+", type=int, default=SAMPLES, help="training images N")
    parser.add_argument("--output", default="output/population_statistics", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="keep finished trainings, go on with unfinished ones")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    args = parser.parse_args(argv)

    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Prepare the data, check everything, and run the rows."""
    sizes = sorted(set(args.sizes) | ({SIZES[0]} if "training" in args.parts else set()), reverse=True)
    files = {size: str(CONFIGS / f"nbs_{size}.yaml") for size in sizes}
    ensure_digits()
    configs = load_rows(files, args.output, args.parts, args.samples, args.opts)
    run_rows(configs, args.output, "digits", args.samples, args.resume)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""The experiments of *Understanding Batch Normalization* (Bjorck et al. 2018): why batch norm allows a higher rate.

    python projects/UnderstandingBatchNorm/run_understanding.py
    python projects/UnderstandingBatchNorm/run_understanding.py --parts depth gradients --seeds 1 depth=110
    python projects/UnderstandingBatchNorm/run_understanding.py \\
        --config-file projects/UnderstandingBatchNorm/configs/cifar10.yaml root=/data

rates:      figure 1, curves at rising learning rates, and the highest one that trains, by bisection.
gradients:  figure 2, histograms of gradients at mid depth, for three initialisations.
steps:      figure 3, relative loss along the gradient over step sizes.
depth:      figure 5, mean and deviation of channels against depth.
outputs:    figure 6, gradient of each output unit over the images of a mini-batch, and its mean over an epoch.
All of them are at initialisation but the first. With three seeds they take some minutes on one idle CPU core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from understanding_pictures import draw_all
from understanding_setting import UnderstandingSetting, build_model, load_images
from understanding_tables import format_tables
from understanding_trials import PARTS, list_trials

from bnext.cli.run_command import run_command
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/understanding_batch_norm", parts=PARTS, configs=CONFIGS)
    args = parse_study(parser, argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, or read what was; print the tables, draw the pictures beside the results."""
    if args.show:
        show_results(args.show, format_tables)
        return

    setting = load_setting(UnderstandingSetting, args.config_file, args.pairs)
    for split in ("train", "val"):
        load_images(setting, split)
    build_model(setting, norm=True, seed=1)  # a depth that cannot be is refused before anything runs
    trials = list_trials(setting, tuple(args.parts))
    results = run_trials(trials, args.output, seeds=args.seeds, setting=setting, resume=args.resume)

    print(f"\n{format_tables(results)}\n")
    for path in (Path(args.output, "results.json"), *draw_all(results, args.output)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())

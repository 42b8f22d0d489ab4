#!/usr/bin/env python
"""The four modes of *smart batch norm*: no norm, batch norm, mini-batch statistics always, and an estimate at the end.

    python projects/SmartBatchNorm/run_smart_batch_norm.py
    python projects/SmartBatchNorm/run_smart_batch_norm.py --parts net --seeds 1 rates=[0.03]
    python projects/SmartBatchNorm/run_smart_batch_norm.py --config-file projects/SmartBatchNorm/configs/mnist.yaml \
        --parts net root=/data

net:      a deliberately unstable net of three convolutions on digits, read after each epoch, at several rates.
detector: the same modes on a RetinaNet, by COCO AP.
Each writes results.json and pictures into a folder of its own in --output; --resume keeps the trainings that are there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mode_detector import list_detector_trials
from mode_pictures import draw_curves, draw_detector, draw_rates
from mode_tables import format_tables
from mode_trials import ModeSetting, list_trials

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"
PARTS = ("net", "detector")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/smart_batch_norm", parts=PARTS, configs=CONFIGS)
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="override the configs of the detector"
    )
    args = parse_study(parser, argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Train and read, or show what was read; print the tables, draw the pictures beside the results."""
    if args.show:
        show_results(args.show, format_tables)
        return

    setting = load_setting(ModeSetting, args.config_file, args.pairs)
    if "net" in args.parts:
        output = os.path.join(args.output, "net")
        trials = list_trials(setting)
        results = run_trials(trials, output, seeds=args.seeds, setting=setting, resume=args.resume)
        print(f"\n{format_tables(results)}\n")
        print(
            draw_curves(results, Path(output, "curves.png")), draw_rates(results, Path(output, "rates.png")), sep="\n"
        )

    if "detector" in args.parts:
        output = os.path.join(args.output, "detector")
        ensure_digits()
        trials = list_detector_trials(output, args.seeds, args.opts)
        options = {"opts": " ".join(args.opts)}
        results = run_trials(trials, output, seeds=args.seeds, setting=options, resume=args.resume)
        print(f"\n{format_tables(results)}\n")
        print(draw_detector(results, Path(output, "detector.png")))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Normalization batch sizes (NBS) at a fixed SGD batch: section 4 of *Rethinking "Batch" in BatchNorm* on digits.

    python projects/NormalizationBatchSize/run_normalization_batch_size.py
    python projects/NormalizationBatchSize/run_normalization_batch_size.py --parts sizes --seeds 1 contrasts=[0]
    python projects/NormalizationBatchSize/run_normalization_batch_size.py \
        --config-file projects/NormalizationBatchSize/configs/imagenet.yaml --parts sizes root=/data/imagenet

sizes:     NBS 2 to 128 on digits as they are, and on digits each of a contrast of its own.
contrast:  the smallest NBS on digits of more and more different contrast.
axes:      the smallest NBS in deeper nets, with smaller maps, at other rates, lengths and shifts.
All three, with three seeds, take about a quarter of an hour on one idle CPU core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from size_pictures import draw_axes, draw_sizes
from size_setting import SizeSetting
from size_tables import format_tables
from size_training import check_sets
from size_trials import PARTS, list_trials

from bnext.cli.run_command import run_command
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/normalization_batch_size", parts=PARTS, configs=CONFIGS)
    args = parse_study(parser, argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Train and measure, or read what was; print the tables, draw the pictures beside the results."""
    if args.show:
        show_results(args.show, format_tables)
        return

    setting = load_setting(SizeSetting, args.config_file, args.pairs)
    check_sets(setting)
    trials = list_trials(setting, args.parts)
    results = run_trials(trials, args.output, seeds=args.seeds, setting=setting, resume=args.resume)

    print(f"\n{format_tables(results)}\n")
    pictures = [draw_sizes(results, Path(args.output, "sizes.png")), draw_axes(results, Path(args.output, "axes.png"))]
    for path in (Path(args.output, "results.json"), *filter(None, pictures)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Nets that read in a mini-batch what else is in it: section 6 of *Rethinking "Batch" in BatchNorm*.

    python projects/Leakage/run_leakage.py
    python projects/Leakage/run_leakage.py --seeds 1 lengths=[] noises=[] joined_patterns=[]
    python projects/Leakage/run_leakage.py --config-file projects/Leakage/configs/imagenet.yaml root=/data/imagenet

classifier:  normalization batches of K classes, M images of each; repairs; share of the pattern, length, noise.
With three seeds it takes some ten minutes on one idle CPU core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from leak_pictures import draw_leak
from leak_setting import LeakSetting
from leak_tables import format_tables
from leak_trials import list_trials, load_sets

from bnext.cli.run_command import run_command
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import read_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/leakage", parts=list(PARTS), configs=CONFIGS)
    args = parse_study(parser, argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Run the parts one after the other, or show what was measured."""
    if args.show:
        print(format_tables(read_results(args.show)))
        return

    for part in args.parts:
        PARTS[part](args)


def run_classifiers(args: argparse.Namespace) -> None:
    """Train and measure; print the tables, draw the picture beside the results."""
    setting = load_setting(LeakSetting, args.config_file, args.pairs)
    output = str(Path(args.output, "classifier"))
    trials = list_trials(setting, load_sets(setting))
    results = run_trials(trials, output, seeds=args.seeds, setting=setting, resume=args.resume)

    print(f"\n{format_tables(results)}\n")
    for path in (Path(output, "results.json"), draw_leak(results, Path(output, "classifier.png"))):
        print(path)


# Each writes to a folder of its name in --output.
PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"classifier": run_classifiers}


if __name__ == "__main__":
    sys.exit(main())

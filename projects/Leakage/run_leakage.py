#!/usr/bin/env python
"""Nets that read in a mini-batch what else is in it: section 6 of *Rethinking "Batch" in BatchNorm*.

    python projects/Leakage/run_leakage.py
    python projects/Leakage/run_leakage.py --seeds 1 lengths=[] noises=[] joined_patterns=[]
    python projects/Leakage/run_leakage.py --config-file projects/Leakage/configs/imagenet.yaml root=/data/imagenet

classifier:  normalization batches of K classes, M images of each; repairs; share of the pattern, length, noise.
rcnn:        box heads on a frozen trunk, one image per worker and otherwise, on pictures that differ more and more.
With three seeds the first takes about ten minutes of an idle CPU core, the second about half an hour. --config-file and
KEY=VALUE are of one part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rcnn_tables
from leak_pictures import draw_leak
from leak_setting import LeakSetting
from leak_tables import format_tables
from leak_trials import list_trials, load_sets
from rcnn_pictures import draw_heads
from rcnn_study import RcnnSetting, run_heads

from bnext.cli.run_command import run_command
from bnext.errors import ConfigError
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = str(CONFIGS / "digits.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/leakage", parts=list(PARTS), configs=CONFIGS)
    args = parse_study(parser, argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Run the parts one after the other, or show what was measured."""
    if args.show:
        show_results(args.show, format_either)
        return

    if len(args.parts) > 1 and (args.pairs or args.config_file != DEFAULT):
        rule, remedy = "be one where settings are changed, as each part has its own", "Name it: --parts classifier."
        raise ConfigError.of("--parts", rule, got=" ".join(args.parts), remedy=remedy)
    for part in args.parts:
        PARTS[part](args)


def format_either(results: Mapping[str, Any]) -> str:
    """The tables of the part that the results are of."""
    return rcnn_tables.format_tables(results) if "styles" in results["setting"] else format_tables(results)


def run_classifiers(args: argparse.Namespace) -> None:
    """Train and measure; print the tables, draw the picture beside the results."""
    setting = load_setting(LeakSetting, args.config_file, args.pairs)
    output = str(Path(args.output, "classifier"))
    trials = list_trials(setting, load_sets(setting))
    results = run_trials(trials, output, seeds=args.seeds, setting=setting, resume=args.resume)

    print(f"\n{format_tables(results)}\n")
    for path in (Path(output, "results.json"), draw_leak(results, Path(output, "classifier.png"))):
        print(path)


def run_rcnn(args: argparse.Namespace) -> None:
    """Train the trunk and the heads; print the tables, draw the picture beside the results."""
    file = CONFIGS / "rcnn" / "digits.yaml" if args.config_file == DEFAULT else args.config_file
    setting = load_setting(RcnnSetting, file, args.pairs)
    output = str(Path(args.output, "rcnn"))
    results = run_heads(setting, output, args.seeds, resume=args.resume)

    print(f"\n{rcnn_tables.format_tables(results)}\n")
    for path in (Path(output, "results.json"), draw_heads(results, Path(output, "rcnn.png"))):
        print(path)


# Each writes to a folder of its name in --output.
PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"classifier": run_classifiers, "rcnn": run_rcnn}


if __name__ == "__main__":
    sys.exit(main())

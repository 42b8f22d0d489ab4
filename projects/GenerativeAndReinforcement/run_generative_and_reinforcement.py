#!/usr/bin/env python
"""Two further cases of *which batch*: the discriminator of a GAN, and the target net of Q-learning.

    python projects/GenerativeAndReinforcement/run_generative_and_reinforcement.py
    python projects/GenerativeAndReinforcement/run_generative_and_reinforcement.py --parts gan --seeds 1

gan:    digits; the discriminator sees real and generated pictures in one batch or apart, with moments of five kinds.
value:  a grid with walls; targets by moving averages, fresh or stale, by precise moments, by mini-batches.
Each writes results.json and a picture into a folder of its own in --output; --resume keeps finished trainings.
Settings are changed by --gan and --value KEY=VALUE.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cases_pictures import draw_gan, draw_value
from cases_tables import format_tables
from gan_trials import GanSetting, list_gan_trials
from value_trials import ValueSetting, list_value_trials

from bnext.cli.run_command import run_command
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"
PARTS = ("gan", "value")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/generative_and_reinforcement", parts=PARTS, num_seeds=5)
    for part in PARTS:
        parser.add_argument(f"--{part}", nargs="*", default=[], metavar="KEY=VALUE", help="change a setting of it")
    args = parse_study(parser, argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Train and read, or show what was read; print the tables, draw the pictures beside the results."""
    if args.show:
        show_results(args.show, format_tables)
        return

    settings = {
        "gan": load_setting(GanSetting, CONFIGS / "gan.yaml", args.gan),
        "value": load_setting(ValueSetting, CONFIGS / "value.yaml", args.value),
    }
    for part in args.parts:
        setting, output = settings[part], os.path.join(args.output, part)
        trials = list_gan_trials(setting) if part == "gan" else list_value_trials(setting)
        results = run_trials(trials, output, seeds=args.seeds, setting=setting, resume=args.resume)

        draw = draw_gan if part == "gan" else draw_value
        print(f"\n{format_tables(results)}\n\n{draw(results, Path(output, f'{part}.png'))}")


if __name__ == "__main__":
    sys.exit(main())

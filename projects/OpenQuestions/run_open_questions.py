#!/usr/bin/env python
"""Open questions of *Rethinking "Batch" in BatchNorm*, answered in small with detectors on digits.

    python projects/OpenQuestions/run_open_questions.py
    python projects/OpenQuestions/run_open_questions.py --parts levels repair --seeds 1
    python projects/OpenQuestions/run_open_questions.py --show projects/OpenQuestions/results/levels.json

groups: levels that share statistics in two or three groups. levels: why row 2 of Table 5 collapses. repair: how many
images a repair of row 3 needs. rois: sampled against top-scored RoIs. A part trains the detectors that it needs; each
has its results.json and its picture in a folder of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import level_questions
import question_pictures
import question_tables
import roi_question
from trained_detectors import HEADS, ROIS, OpenSetting, Trainings

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import load_setting
from bnext.studies.trials import run_trials

CONFIGS = Path(__file__).parent / "configs"
# Part -> its trial, and the trainings that it needs.
PARTS = {
    "groups": (level_questions.ask_groups, HEADS),
    "levels": (level_questions.ask_levels, ("shared", "per_level")),
    "repair": (level_questions.ask_repair, ("per_level",)),
    "rois": (roi_question.ask_rois, (ROIS,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, "output/open_questions", parts=tuple(PARTS), configs=CONFIGS)
    args = parse_study(parser, argv)

    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check everything, and run the parts; or show what is there."""
    if args.show:
        show_results(args.show, question_tables.format_results)
        return

    setting = load_setting(OpenSetting, args.config_file, args.pairs)
    if setting.trainings == "digits":
        ensure_digits()
    trainings = Trainings(setting, args.output, args.resume)
    for part in args.parts:
        trainings.check(PARTS[part][1], args.seeds[0])

    for part in args.parts:
        folder = os.path.join(args.output, part)
        trials = {part: partial(PARTS[part][0], trainings)}
        results = run_trials(trials, folder, seeds=args.seeds, setting=setting, resume=args.resume)
        print(question_tables.format_results(results), flush=True)
        question_pictures.draw_results(results, os.path.join(folder, f"{part}.png"))


if __name__ == "__main__":
    sys.exit(main())

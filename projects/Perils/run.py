#!/usr/bin/env python
"""Bugs of batch normalization, each as a small training on digits: with the bug, what the doctor says, repaired.

    python projects/Perils/run.py
    python projects/Perils/run.py two_domains averaged_weights --seeds 5
    python projects/Perils/run.py row_3 --iterations 800

All stories with three seeds take some minutes on two CPU cores; most of it is the detector of row_3, which has one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detector_story import DETECTOR_STORY
from mini_batch_stories import MINI_BATCH_STORIES
from perils import Extent, Story, find_misdiagnosed, run_stories
from perils_tables import draw_stories, format_more, format_stories
from training_stories import TRAINING_STORIES

from bnext.cli.run_command import run_command

STORIES: dict[str, Story] = {**MINI_BATCH_STORIES, "row_3": DETECTOR_STORY, **TRAINING_STORIES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 where the doctor named something else first, or 2 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = Extent()

    names = ", ".join(STORIES)
    parser.add_argument("stories", nargs="*", metavar="STORY", help=f"some of {names} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=extent.epochs, help="of a classifier (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=extent.iterations, help="of row_3 (default: %(default)s)")
    parser.add_argument("--output", default="output/perils", help="folder for the results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes that are there")
    args = parser.parse_args(argv)

    unknown = [name for name in args.stories if name not in STORIES]
    if unknown:
        parser.error(f"STORY must be one of {names}; got {', '.join(unknown)}")
    for name in ("seeds", "epochs", "iterations"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more; got {getattr(args, name)}")
    return run_command(lambda: run(args))


def format_tables(results: Mapping[str, Any]) -> str:
    """The table of the stories, from what results.json holds."""
    return format_stories(STORIES, results)


def run(args: argparse.Namespace) -> int:
    """Tell the stories; print the tables, write results.json, table.md and perils.png."""
    stories = {name: story for name, story in STORIES.items() if name in args.stories or not args.stories}
    extent = Extent(epochs=args.epochs, iterations=args.iterations)
    results = run_stories(stories, args.output, args.seeds, extent, resume=args.resume)

    tables = f"{format_stories(STORIES, results)}\n\n{format_more(STORIES, results)}\n"
    Path(args.output, "table.md").write_text(tables)
    picture = draw_stories(STORIES, results, Path(args.output, "perils.png"))
    print(f"\n{tables}\n{Path(args.output, 'results.json')}\n{picture}", flush=True)

    wrong = find_misdiagnosed(stories, results)
    for sentence in wrong:
        print(f"The doctor was wrong: {sentence}.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""One detector for several domains: whose statistics, whose affine, when to adapt, and what a stream does.

    python projects/Domains/run_domains.py
    python projects/Domains/run_domains.py --parts table --seeds 1 --opts SOLVER.MAX_ITER 200    # a quick look

table: the six rows of the paper's Table 5 with domains in the place of levels, and a specialist for each domain.
targets: a detector of clean images on corrupted ones, with the statistics of the source, of N images of the target, of
each image, and with the rules for unseen domains. stream: the same detector on a stream that changes domain and comes
back. adversarial: clean training against adversarial copies with shared statistics and with their own. Each writes
results.json and a picture; --resume goes on with the trainings that are there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import adaptation
import adversarial
import domain_pictures
import domain_table

from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.engine.launch import launch
from bnext.studies.runner import run_study

CONFIGS = Path(__file__).parent / "configs"
PARTS = ("table", "targets", "stream", "adversarial")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="output/domains", help="folder for the results (default: %(default)s)")
    parser.add_argument("--num-gpus", type=int, default=1, help="workers; on a machine without GPUs, CPU workers")
    parser.add_argument("--resume", action="store_true", help="keep finished trainings, go on with unfinished ones")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    args = parser.parse_args(argv)

    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Prepare the data, check everything, and run the parts in all workers."""
    ensure_digits()
    for part in args.parts:
        configs = load_part(part, args)
        device = next(iter(configs.values())).MODEL.DEVICE
        launch(run_part, args.num_gpus, args=(part, configs, args.output, args.resume), device=device)


def load_part(part: str, args: argparse.Namespace) -> Mapping[Any, Any]:
    """The configs of a part, checked."""
    if part == "table":
        trainings = domain_table.list_trainings(args.seeds)
        file = str(CONFIGS / "three_domains.yaml")
        return domain_table.load_configs(file, args.output, trainings, args.opts, args.num_gpus)
    if part == "adversarial":
        trainings_with = adversarial.list_trainings(args.seeds)
        file = str(CONFIGS / "adversarial.yaml")
        return adversarial.load_configs(file, args.output, trainings_with, args.opts, args.num_gpus)
    return adaptation.load_configs(str(CONFIGS / "one_domain.yaml"), args.output, args.seeds, args.opts, args.num_gpus)


def run_part(part: str, configs: Mapping[Any, Any], output: str, resume: bool) -> None:
    """One part in one worker; its picture comes with its table."""
    folder = os.path.join(output, part)
    arguments: dict[str, tuple[Any, ...]] = {
        "table": (domain_table.run, domain_table.describe, domain_table.format_table, domain_pictures.draw_table),
        "targets": (
            adaptation.run_targets,
            adaptation.describe,
            domain_pictures.format_targets,
            domain_pictures.draw_targets,
        ),
        "stream": (
            adaptation.run_stream,
            adaptation.describe,
            domain_pictures.format_stream,
            domain_pictures.draw_stream,
        ),
        "adversarial": (
            adversarial.run,
            adversarial.describe,
            adversarial.format_table,
            domain_pictures.draw_adversarial,
        ),
    }
    run_row, describe, show, draw = arguments[part]
    tasks = {
        "table": domain_table.DOMAINS,
        "targets": (adaptation.SOURCE, *adaptation.CORRUPTIONS, "clean under"),
        "stream": (*adaptation.RULES, "own statistics"),
        "adversarial": ("AP",),
    }[part]

    def show_and_draw(results: Mapping[str, Any]) -> str:
        return f"{show(results)}\n\n{draw(results, os.path.join(folder, f'{part}.png'))}"

    run_study(configs, folder, run_row, describe, show_and_draw, tasks=tasks, resume=resume)


if __name__ == "__main__":
    sys.exit(main())

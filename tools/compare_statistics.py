#!/usr/bin/env python
"""Same checkpoint, which statistics? COCO AP with the moving average of the file, precise ones, mini-batches, and more.

    python tools/compare_statistics.py --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --output FOLDER
    python tools/compare_statistics.py ... --kinds moving_average precise --target-dataset NAME --num-gpus 2
    python tools/compare_statistics.py ... --target-dataset my_night_val --domain-dataset my_night_train

Writes FOLDER/statistics.json and statistics.png; the checkpoint is only read. On a machine without GPUs --num-gpus
counts CPU workers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import start  # noqa: F401  before all that takes time

from bnext.cli.arguments import parse_arguments
from bnext.cli.compare import find_kept_results, run_comparison
from bnext.cli.run_command import load_config_to_reestimate, run_command
from bnext.repair.kinds import KINDS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="of the model of MODEL.WEIGHTS")
    add("--kinds", nargs="+", metavar="KIND", help=f"some of {', '.join(KINDS)} (default: all)")
    add("--output", default="output/compare_statistics", metavar="FOLDER", help="(default: %(default)s)")
    add("--target-dataset", metavar="NAME", help="evaluate on it, and adapt to it, instead of DATASETS.TEST")
    add("--domain", metavar="NAME", help="of all images, where norms have statistics or weights per domain")
    add("--domain-dataset", metavar="NAME", help="training images of the domain that is evaluated, for per_domain")
    add("--num-gpus", type=int, default=1, metavar="N", help="workers")
    add("--overwrite", action="store_true", help="replace an earlier comparison in the folder")
    add("opts", nargs="*", metavar="KEY VALUE", help="pairs that override the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a mistake that the user can mend, or 130 after Ctrl-C."""
    args = parse_arguments(build_parser(), argv, intermixed=True)
    return run_command(lambda: compare(args), find_kept_results(args.output))


def compare(args: argparse.Namespace) -> None:
    """Load the config and hand over what is asked."""
    given = args.kinds or []
    kinds = list(itertools.takewhile(lambda word: "." not in word, given))
    pairs = [*args.opts, *given[len(kinds) :]]  # which may follow --kinds
    opts = [*pairs, "OUTPUT_DIR", args.output]
    if args.target_dataset:
        opts += ["DATASETS.TEST", repr((args.target_dataset,))]
    if not kinds:
        kinds = [kind for kind in KINDS if kind != "per_domain" or args.domain_dataset]

    cfg = load_config_to_reestimate(args.config_file, opts)
    command = ["--config-file", args.config_file, *pairs]
    run_comparison(cfg, kinds, args.num_gpus, args.overwrite, args.domain, args.domain_dataset, command)


if __name__ == "__main__":
    sys.exit(main())

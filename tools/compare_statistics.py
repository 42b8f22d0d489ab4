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
from pathlib import Path

from bnext.cli.compare import run_comparison
from bnext.cli.run_command import run_command
from bnext.config.load import load_config
from bnext.repair.kinds import KINDS

SWITCHES = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.BNEXT.SMART_BATCH_NORM", "False"]  # what is done here


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
    args = build_parser().parse_intermixed_args(argv)
    path = Path(args.output, "statistics.json")
    before = read_stamp(path)
    try:
        return run_command(lambda: compare(args))
    except KeyboardInterrupt:
        is_new = read_stamp(path) != before  # not of an earlier comparison
        kept = f"what is measured so far is in {path}" if is_new else "nothing is written"
        print(f"interrupted; {kept}.", file=sys.stderr)
        return 130


def read_stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that replaces it; None: there is none."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def compare(args: argparse.Namespace) -> None:
    """Load the config and hand over what is asked."""
    target = ["DATASETS.TEST", f"('{args.target_dataset}',)"] if args.target_dataset else []
    given = args.kinds or []
    opts = [*args.opts, *itertools.dropwhile(lambda word: "." not in word, given)]  # pairs that follow --kinds
    kinds = list(itertools.takewhile(lambda word: "." not in word, given))
    kinds = kinds or [kind for kind in KINDS if kind != "per_domain" or args.domain_dataset]
    cfg = load_config(args.config_file, [*opts, *SWITCHES, *target, "OUTPUT_DIR", args.output])
    run_comparison(cfg, kinds, args.num_gpus, args.overwrite, args.domain, args.domain_dataset)


if __name__ == "__main__":
    sys.exit(main())

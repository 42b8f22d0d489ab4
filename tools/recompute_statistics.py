#!/usr/bin/env python
"""Estimate the population statistics of a saved checkpoint anew, without training (PreciseBN, AdaBN).

    python tools/recompute_statistics.py --config-file CONFIG.yaml MODEL.WEIGHTS in.pth --output out.pth
    python tools/recompute_statistics.py ... --population per_level --num-samples 4000 --tolerance 0.01
    python tools/recompute_statistics.py ... --dataset NAME --source-samples 64    # a target domain, without labels

The config describes the model of in.pth, which is only read. On a machine without GPUs --num-gpus counts CPU workers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import get_args

import start  # noqa: F401  before all that takes time

from bnext.cli.arguments import parse_arguments
from bnext.cli.reestimate import POPULATIONS, RecomputeRequest, run_request
from bnext.cli.run_command import load_config_to_reestimate, run_command
from bnext.errors import ConfigError
from bnext.statistics.recompute import Estimator

PRECISE_BN = "TEST.BNEXT.PRECISE_BN"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    add("--config-file", required=True, metavar="FILE", help="of the model of MODEL.WEIGHTS")
    add("--output", required=True, metavar="FILE", help="the checkpoint to write, *.pth; its report is *.json")
    add("--population", help=f"whose statistics the output has: {', '.join(POPULATIONS)} (default: as the config says)")
    add("--dataset", action="append", default=[], metavar="NAME", help="instead of DATASETS.TRAIN; needs no labels")
    add("--domain", action="append", default=[], metavar="NAME", help="of each --dataset, for statistics per domain")

    add("--num-samples", type=int, metavar="N", help="images that are enough")
    add("--tolerance", type=float, metavar="T", help="stop at this standard error, such as 0.01")
    add("--estimator", help=f"one of {', '.join(get_args(Estimator))}")
    add("--source-samples", type=float, default=0, metavar="N", help="images that the old statistics count for")

    add("--num-gpus", type=int, default=1, metavar="N", help="workers")
    add("--resume", action="store_true", help=argparse.SUPPRESS)
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("opts", nargs="*", metavar="KEY VALUE", help="pairs that override the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for a mistake that the user can mend, or 130 after Ctrl-C."""
    args = parse_arguments(build_parser(), argv, intermixed=True)
    return run_command(lambda: recompute(args), lambda: "nothing is written")


def recompute(args: argparse.Namespace) -> None:
    """Load the config and hand over what is asked."""
    if args.resume:
        remedy = "A re-estimation takes minutes, and begins anew."
        raise ConfigError.of("--resume", "be left out", got="it", remedy=remedy)
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        remedy = "Use 0.01 for 1 %."
        raise ConfigError.of("--tolerance", "be 0 (none) or above", got=args.tolerance, remedy=remedy)

    opts = [*args.opts]
    for key, value in (("ESTIMATOR", args.estimator), ("TOLERANCE", args.tolerance)):
        if value is not None:
            opts += [f"{PRECISE_BN}.{key}", str(value)]
    cfg = load_config_to_reestimate(args.config_file, opts)

    request = RecomputeRequest(
        output=args.output,
        population=args.population,
        datasets=tuple(args.dataset),
        domains=tuple(args.domain),
        num_samples=args.num_samples,
        source_samples=args.source_samples,
        overwrite=args.overwrite,
    )
    run_request(cfg, request, args.num_gpus)


if __name__ == "__main__":
    sys.exit(main())

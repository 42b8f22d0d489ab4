#!/usr/bin/env python
"""See what an R-CNN head has learned of the fact that the RoIs of its mini-batches were of one image.

    python projects/RethinkingBatchNorm/show_leakage.py \\
        --model "BN per worker" CONFIG.yaml OUTPUT/model_final.pth --model "shuffled" CONFIG.yaml OUTPUT/model_final.pth

Each model is evaluated with mini-batches of one image, with mini-batches of RoIs mixed between images, and with
population statistics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bnext.cli.run_command import run_command
from bnext.cli.train import check_run
from bnext.config.load import load_config
from bnext.engine.output import holding_output
from bnext.errors import ConfigError
from bnext.evaluation.leakage import show_leakage


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs=3,
        action="append",
        required=True,
        metavar=("TITLE", "CONFIG", "WEIGHTS"),
        help="a trained model; may be repeated",
    )
    parser.add_argument("--images-per-batch", type=int, default=8, help="whose RoIs are mixed")
    parser.add_argument("--output", default="output/leakage", help="folder of leakage.json and leakage.png")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs that override every config")
    args = parser.parse_args(argv)

    return run_command(lambda: show(args))


def show(args: argparse.Namespace) -> None:
    """Check everything, then evaluate one model after another."""
    models = {}
    for title, file, weights in args.model:
        if title in models:
            raise ConfigError.of("--model", "have a title of its own", got=f"{title!r} twice", remedy="Rename one.")
        cfg = load_config(file, [*args.opts, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", args.output])
        check_run(cfg, eval_only=True)
        models[title] = (cfg, weights)
    with holding_output(args.output, "--output"):
        show_leakage(models, args.output, args.images_per_batch)


if __name__ == "__main__":
    sys.exit(main())

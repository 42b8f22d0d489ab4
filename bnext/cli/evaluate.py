"""Evaluate a checkpoint: `train --eval-only` under a name of its own, and under other conditions than the file's."""

from __future__ import annotations

import argparse
from typing import get_args

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.run_command import load_config_to_reestimate
from bnext.cli.train import add_launch_arguments, run
from bnext.config import load_config
from bnext.errors import ConfigError, Refusal
from bnext.evaluation.conditions import Conditions, StatisticsAtTest

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """COCO AP of a checkpoint on every set of DATASETS.TEST, and by domain: of each, their mean, the worst.

    bnext evaluate --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth
    bnext evaluate --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth DATASETS.TEST "('my_val',)"
    bnext evaluate ... --statistics target      # of the test images, without their labels
    bnext evaluate ... --unseen mixture         # what normalizes images of domains that the norms do not have
    bnext evaluate ... --specialists day=day/inference/results.json night=night/inference/results.json

With --statistics, --domain or --unseen the results are in a folder of their own in OUTPUT_DIR/inference. On a machine
without GPUs --num-gpus counts CPU workers."""
IS_INTERMIXED = True
DOMAINS = "MODEL.BNEXT.DOMAINS"
NO_PAIR = Refusal(
    ConfigError,
    "--specialists",
    "be pairs of a domain and its results",
    "Write --specialists day=day/inference/results.json night=night/inference/results.json.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}")

    kinds = ", ".join(get_args(StatisticsAtTest))
    add("--statistics", default="file", metavar="KIND", help=f"that normalize: {kinds} (default: %(default)s)")
    add("--domain", metavar="NAME", help="of which all images are taken to be, instead of that of their set")
    add("--unseen", metavar="RULE", help=f"for images of domains that norms do not have: {DOMAINS}.UNSEEN")
    help = "results of detectors that were trained on one domain each, for the gap to them"
    add("--specialists", nargs="+", metavar="DOMAIN=FILE", help=help)

    add_launch_arguments(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)
    parser.set_defaults(resume=False, eval_only=True)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    specialists = _take_specialists(args)
    conditions = Conditions(args.statistics, args.domain, args.unseen or "", specialists)
    if args.unseen:
        # What the config says of another rule would be refused beside this one.
        unused = [] if args.unseen == "fallback" else [f"{DOMAINS}.FALLBACK", "''"]
        unused += [] if args.unseen in ("blend", "stream") else [f"{DOMAINS}.SOURCE_IMAGES", "None"]
        args.opts = [*unused, *args.opts, f"{DOMAINS}.UNSEEN", args.unseen]

    load = load_config_to_reestimate if conditions.statistics == "target" else load_config
    cfg = load(args.config_file, args.opts)
    run(cfg, args, conditions=None if conditions == Conditions() else conditions)


def _take_specialists(args: argparse.Namespace) -> dict[str, str]:
    """Domain -> file; the pairs of the config that follow go where they belong."""
    words: list[str] = args.specialists or []
    number = next((index for index, word in enumerate(words) if not word.endswith(".json")), len(words))
    args.opts = [*args.opts, *words[number:]]

    pairs = [word.partition("=") for word in words[:number]]
    wrong = [word for word, (domain, _, file) in zip(words, pairs, strict=False) if not domain or not file]
    if wrong or (words and not pairs):
        raise NO_PAIR.of(repr((wrong or words)[0]))
    return {domain: file for domain, _, file in pairs}

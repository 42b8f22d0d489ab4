"""The doctor: what is wrong with the batch norms of a config, a checkpoint, or both."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.doctor_report import (
    add_report_arguments,
    check_report,
    give_report,
    keeping_output_clean,
    tell_of_checks,
)
from bnext.config import load_config
from bnext.config.files import name_config_file
from bnext.config.merge import split_pairs
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Facts, Origin
from bnext.errors import ConfigError
from bnext.evaluation.doctor import examine_detector
from bnext.evaluation.doctor_checkpoint import ENDINGS, examine_checkpoint
from bnext.evaluation.doctor_data import DEFAULT_IMAGES, add_data_facts

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """Find what is wrong with the batch norms of a detector, before, during or after its training.

    bnext doctor --config-file CONFIG.yaml
    bnext doctor --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --data
    bnext doctor --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --depth full --num-images 500
    bnext doctor model_final.pth    # the file alone, of any library: less is known of it

Nothing is written but --output, no weight is fetched, nothing of a checkpoint is run. The exit status is 1 where
--fail-on is met, 2 for a mistake in the command."""
IS_INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=f"of the model: {FILE_HELP}")
    add(
        "--depth",
        choices=("static", "forward", "full"),
        default="static",
        help="static: model and config alone. forward: a few batches of DATASETS.TRAIN, and pixels of DATASETS.TEST. "
        "full: in addition statistics re-estimated on training images, and AP and loss of three kinds of statistics",
    )

    add("--data", action="store_const", const="forward", dest="depth", help="the same as --depth forward")
    few, many = DEFAULT_IMAGES["forward"], DEFAULT_IMAGES["full"]
    images_help = f"that are run at most (default: {few} at depth forward, {many} of training and of test at full)"
    add("--num-images", type=int, metavar="N", help=images_help)

    add("--num-gpus", type=int, metavar="N", help="workers that train the model (default: 1)")
    add_report_arguments(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help=f"a checkpoint alone; or {PAIRS_HELP}")


def execute(args: argparse.Namespace) -> int:
    """Run the command; the status is 1 where --fail-on is met."""
    if tell_of_checks(args):
        return 0
    check_report(args)
    if args.num_images is not None and args.num_images < 1:
        remedy = "Leave it out for the default."
        raise ConfigError.of("--num-images", "be 1 or more", got=args.num_images, remedy=remedy)
    if args.num_gpus is not None and args.num_gpus < 1:
        remedy = "Workers without a GPU count, too; leave it out for one."
        raise ConfigError.of("--num-gpus", "be 1 or more", got=args.num_gpus, remedy=remedy)

    with keeping_output_clean():
        facts = _examine_file(args) if _names_file(args) else _examine_config(args)
        diagnosis = examine_facts(facts)
    return give_report(args, diagnosis)


def _names_file(args: argparse.Namespace) -> bool:
    """Whether the first word is a checkpoint, and not the key of a pair."""
    word = args.opts[0] if args.opts else ""
    is_path = os.path.exists(word) or ("/" in word and "=" not in word)
    return word.endswith(ENDINGS) or (is_path and not args.config_file)


def _examine_config(args: argparse.Namespace) -> Facts:
    if not args.config_file and not args.opts:
        remedy = "Give --config-file FILE, or a checkpoint."
        raise ConfigError.of("doctor", "be told of a model", got="none", remedy=remedy)
    cfg = load_config(args.config_file, args.opts)
    file, opts = name_config_file(args.config_file), _leave_out_weights(args.opts)
    origin = Origin("config", file, opts, cfg.MODEL.WEIGHTS, tuple(args.imports), args.num_gpus)
    facts, model = examine_detector(cfg, origin, args.num_gpus)
    if args.depth == "static":
        return facts
    return add_data_facts(facts, cfg, model, args.depth, args.num_images)


def _leave_out_weights(opts: Sequence[str]) -> tuple[str, ...]:
    """Pairs that override a config, but for the weights, which a remedy names by themselves."""
    words: list[str] = []
    pairs = split_pairs(opts)
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        words += [] if key == "MODEL.WEIGHTS" else [key, value]
    return tuple(words)


def _examine_file(args: argparse.Namespace) -> Facts:
    """The facts of a checkpoint alone, which is all that was given."""
    file, *others = args.opts
    if args.config_file:
        remedy = f"Write MODEL.WEIGHTS {file}."
        raise ConfigError.of("A checkpoint beside a config", "be given by its key", got=repr(file), remedy=remedy)
    if others or args.depth != "static":
        got = repr(others[0]) if others else f"--depth {args.depth}"
        remedy = "Give the config with --config-file, and the checkpoint as MODEL.WEIGHTS."
        raise ConfigError.of("A checkpoint alone", "be all that is given", got=got, remedy=remedy)
    return examine_checkpoint(file)

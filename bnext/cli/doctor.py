"""The doctor: what is wrong with the batch norms of a config, a checkpoint, or both."""

from __future__ import annotations

import argparse

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
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.evaluation.doctor import examine_detector

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """Find what is wrong with the batch norms of a detector, before, during or after its training.

    bnext doctor --config-file CONFIG.yaml
    bnext doctor --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --data

Nothing is written but --output, no weight is fetched, nothing of a checkpoint is run. The exit status is 1 where
--fail-on is met, 2 for a mistake in the command."""
IS_INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=f"of the model: {FILE_HELP}")
    add("--num-gpus", type=int, metavar="N", help="workers that train the model (default: 1)")
    add_report_arguments(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> int:
    """Run the command; the status is 1 where --fail-on is met."""
    if tell_of_checks(args):
        return 0
    check_report(args)

    with keeping_output_clean():
        cfg = load_config(args.config_file, args.opts)
        origin = Origin("config", name_config_file(args.config_file), tuple(args.opts), cfg.MODEL.WEIGHTS)
        facts, _ = examine_detector(cfg, origin, args.num_gpus)
        diagnosis = examine_facts(facts)
    return give_report(args, diagnosis)

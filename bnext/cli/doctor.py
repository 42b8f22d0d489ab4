"""The doctor: what is wrong with the batch norms of a config, a checkpoint, or both."""

from __future__ import annotations

import argparse

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.config import load_config
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.evaluation.doctor import examine_detector

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """Find what is wrong with the batch norms of a detector, before, during or after its training.

    bnext doctor --config-file CONFIG.yaml
    bnext doctor --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --data

Nothing is written, no weight is fetched, nothing of a checkpoint is run."""
IS_INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=f"of the model: {FILE_HELP}")
    add("--fail-on", choices=("error", "warning"), help="end with status 1 if there is a finding as bad as that")
    add("--num-gpus", type=int, metavar="N", help="workers that train the model (default: 1)")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> int:
    """Run the command; the status is 1 where --fail-on is met."""
    cfg = load_config(args.config_file, args.opts)
    origin = Origin("config", args.config_file, tuple(args.opts), cfg.MODEL.WEIGHTS)
    facts, _ = examine_detector(cfg, origin, args.num_gpus)
    diagnosis = examine_facts(facts)
    print(diagnosis, flush=True)
    return 1 if args.fail_on and diagnosis.select(args.fail_on) else 0

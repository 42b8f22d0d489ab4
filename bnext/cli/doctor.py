"""The doctor: what is wrong with the batch norms of a config, a checkpoint, or both."""

from __future__ import annotations

import argparse

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.config import load_config
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Facts, Origin
from bnext.errors import ConfigError
from bnext.evaluation.doctor import examine_detector
from bnext.evaluation.doctor_checkpoint import ENDINGS, examine_checkpoint

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """Find what is wrong with the batch norms of a detector, before, during or after its training.

    bnext doctor --config-file CONFIG.yaml
    bnext doctor --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --data
    bnext doctor model_final.pth    # the file alone, of any library: less is known of it

Nothing is written, no weight is fetched, nothing of a checkpoint is run."""
IS_INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=f"of the model: {FILE_HELP}")
    add("--fail-on", choices=("error", "warning"), help="end with status 1 if there is a finding as bad as that")
    add("--num-gpus", type=int, metavar="N", help="workers that train the model (default: 1)")
    add("opts", nargs="*", metavar="KEY VALUE", help=f"a checkpoint alone; or {PAIRS_HELP}")


def execute(args: argparse.Namespace) -> int:
    """Run the command; the status is 1 where --fail-on is met."""
    if args.opts and args.opts[0].endswith(ENDINGS):
        facts = _examine_file(args)
    else:
        cfg = load_config(args.config_file, args.opts)
        origin = Origin("config", args.config_file, tuple(args.opts), cfg.MODEL.WEIGHTS)
        facts, _ = examine_detector(cfg, origin, args.num_gpus)

    diagnosis = examine_facts(facts)
    print(diagnosis, flush=True)
    return 1 if args.fail_on and diagnosis.select(args.fail_on) else 0


def _examine_file(args: argparse.Namespace) -> Facts:
    file, *others = args.opts
    if args.config_file:
        remedy = f"Write MODEL.WEIGHTS {file}."
        raise ConfigError.of("A checkpoint beside a config", "be given by its key", got=repr(file), remedy=remedy)
    if others:
        remedy = "Give the config with --config-file, and the checkpoint as MODEL.WEIGHTS."
        raise ConfigError.of("A checkpoint alone", "be all that is given", got=repr(others[0]), remedy=remedy)
    return examine_checkpoint(file)

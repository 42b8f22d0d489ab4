"""The arguments that the commands of studies share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["add_study_arguments", "parse_study"]


def add_study_arguments(
    parser: argparse.ArgumentParser,
    output: str,
    *,
    parts: Sequence[str] = (),
    num_seeds: int = 3,
    configs: Path | None = None,
) -> None:
    """Give a command the arguments of a study.

    Args:
        parser: of the command.
        output: default of --output.
        parts: of the study; with them there is --parts.
        num_seeds: default of --seeds.
        configs: folder of the settings, of which digits.yaml is the default; with it there are --config-file and
            KEY=VALUE pairs.
    """
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="(default: all)")
    if configs is not None:
        default = str(configs / "digits.yaml")
        others = ", ".join(sorted(file.name for file in configs.glob("*.yaml")))
        parser.add_argument("--config-file", default=default, help=f"the settings; in {configs.name}/ are {others}")
        parser.add_argument("pairs", nargs="*", metavar="KEY=VALUE", help="change a setting")

    parser.add_argument("--seeds", type=count, default=num_seeds, metavar="N", help="1 to N (default: %(default)s)")
    parser.add_argument("--output", default=output, help="folder for the results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what is finished, go on with the rest")
    parser.add_argument("--show", metavar="RESULTS", help="run nothing; print the tables of a results.json")


def parse_study(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command line; pairs may stand anywhere, and `seeds` are the list 1 to N."""
    args = parser.parse_intermixed_args(argv)
    args.seeds = list(range(1, args.seeds + 1))
    return args


def count(text: str) -> int:
    """A number of seeds: argparse names the function of a word that is none."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {number}")
    return number

"""Options of a command line: an unknown one is told in a line, with the one that may have been meant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from bnext.errors import ConfigError
from bnext.text import find_near

__all__ = ["FILE_HELP", "PAIRS_HELP", "parse_arguments", "take_pairs"]

FILE_HELP = "YAML, or a LazyConfig (.py), whose code runs; or the name of a config of bnext"
PAIRS_HELP = "pairs, or KEY=VALUE, that override the config; key=value of a LazyConfig"
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*|[\w.]+=.*")  # of an override


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, intermixed: bool = False
) -> argparse.Namespace:
    """The values of a command line; where it is wrong, one line on the standard error stream and exit status 2.

    Args:
        parser: knows the options.
        argv: words; None: those of this process.
        intermixed: whether options may stand among KEY VALUE pairs.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    known = [option for action in parser._actions for option in action.option_strings]

    if words and words[0].endswith((".yaml", ".yml", ".py")) and "--config-file" in known:
        remedy = f"Write --config-file {words[0]}."
        _end(ConfigError.of("A config", "be given by its option", got=words[0], remedy=remedy))
    for word in words:
        option = word.split("=")[0]
        if not option.startswith("--") or option == "--":
            continue
        if not any(name.startswith(option) for name in known):  # argparse takes an abbreviation
            _refuse(option, known)
    return parser.parse_intermixed_args(words) if intermixed else parser.parse_args(words)


def take_pairs(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Put the pairs that follow an option of several words where they belong: to `args.opts`.

    Args:
        args: is changed.
        options: names of those options, as attributes of `args`.

    Example:
        >>> args = argparse.Namespace(kinds=["precise", "SEED", "1"], opts=[])
        >>> take_pairs(args, ["kinds"])
        >>> args
        Namespace(kinds=['precise'], opts=['SEED', '1'])
    """
    for option in options:
        words = getattr(args, option) or []
        number = next((index for index, word in enumerate(words) if _KEY.fullmatch(word)), len(words))
        if number < len(words):
            setattr(args, option, words[:number] or None)
            args.opts = [*args.opts, *words[number:]]


def _refuse(option: str, known: Sequence[str]) -> NoReturn:
    near = [name for name in known if option.startswith(f"{name}-")] or find_near(option, known, most=1)
    remedy = f"Did you mean {near[0]}?" if near else "See --help."
    _end(ConfigError.of("An option", "be one that the command has", got=option, remedy=remedy))


def _end(error: ConfigError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)

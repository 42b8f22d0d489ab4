"""Shared by command lines: an exit status, one line for a mistake that the user can mend, what is switched on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode

from bnext.config.load import load_config
from bnext.errors import BNextError
from bnext.text import flatten_text

__all__ = ["load_config_to_reestimate", "run_command"]


def run_command(command: Callable[[], object], say_kept: Callable[[], str] | None = None) -> int:
    """Run what a command line asks for; the status to exit with.

    Args:
        command: does it.
        say_kept: tells after Ctrl-C what there is of the results; None: Ctrl-C is not caught.

    Returns:
        0; 2 after a mistake that the user can mend, whose message is one line on the standard error stream; 130 after
        Ctrl-C, with such a line, too.
    """
    try:
        command()

    except BNextError as error:
        text = str(error)
        if "Original Traceback" in text:  # of a process that loads images; torch puts all of it into the message
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        print(f"error: {flatten_text(text)}", file=sys.stderr)
        return 2

    except KeyboardInterrupt:
        if say_kept is None:
            raise
        print(f"interrupted; {say_kept()}.", file=sys.stderr)
        return 130

    return 0


def load_config_to_reestimate(file: str, opts: Sequence[str]) -> CfgNode:
    """The config of a checkpoint whose statistics a command re-estimates: what a training would be told is switched on.

    Args:
        file: YAML.
        opts: KEY VALUE pairs that override it.

    Raises:
        ConfigError: the config is wrong.
    """
    return load_config(file, [*opts, "TEST.PRECISE_BN.ENABLED", "True", "TEST.BNEXT.SMART_BATCH_NORM", "False"])

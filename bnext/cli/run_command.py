"""What a command line gives back: an exit status, and one line for a mistake that the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable

from bnext.errors import BNextError

__all__ = ["run_command"]


def run_command(command: Callable[[], object]) -> int:
    """Run what a command line asks for; the status to exit with.

    Args:
        command: does it.

    Returns:
        0; or 2 after a mistake that the user can mend, whose message is one line on the standard error stream.
    """
    try:
        command()
    except BNextError as error:
        text = str(error)
        if "Original Traceback" in text:  # of a process that loads images; torch puts all of it into the message
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0

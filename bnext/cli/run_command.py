"""Shared by command lines: an exit status, one line for a mistake that the user can mend, what is switched on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from detectron2.config import CfgNode

from bnext.config.load import load_config
from bnext.engine.interrupts import interrupt_once
from bnext.engine.streams import guard_streams
from bnext.errors import BNextError, is_interrupted
from bnext.files import explain_os_error
from bnext.packages import explain_missing
from bnext.text import flatten_text

__all__ = ["load_config_to_reestimate", "run_command"]


def run_command(command: Callable[[], int | None], say_kept: Callable[[], str] | None = None) -> int:
    """Run what a command line asks for; the status to exit with.

    Args:
        command: does it; may return the status of a run that went well.
        say_kept: tells after Ctrl-C what there is of the results; None: what the interrupt itself says, if anything.

    Returns:
        0, or what the command returned; 2 after a mistake that the user can mend, whose message is one line on the
        standard error stream; 130 after Ctrl-C, with such a line, too.
    """
    guard_streams()
    try:
        with _taking_interrupts():
            status = command()

    except (Exception, KeyboardInterrupt) as error:
        if is_interrupted(error):
            own_words = str(error) if isinstance(error, KeyboardInterrupt) else ""
            kept = say_kept() if say_kept is not None else own_words
            print(f"interrupted; {kept}." if kept else "interrupted.", file=sys.stderr)
            return 130

        refusal = error if isinstance(error, BNextError) else explain_missing(error) or explain_os_error(error)
        if refusal is None:
            raise
        text = str(refusal)
        if "Original Traceback" in text:  # of a process that loads images; torch puts all of it into the message
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        print(f"error: {flatten_text(text)}", file=sys.stderr)
        return 2

    return status or 0


@contextlib.contextmanager
def _taking_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the block, and only once: nothing disturbs what is put in order."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return

    signal.signal(signal.SIGINT, interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def load_config_to_reestimate(file: str, opts: Sequence[str]) -> CfgNode:
    """The config of a checkpoint whose statistics a command re-estimates: what a training would be told is switched on.

    Args:
        file: YAML.
        opts: KEY VALUE pairs that override it.

    Raises:
        ConfigError: the config is wrong.
    """
    return load_config(file, [*opts, "TEST.PRECISE_BN.ENABLED", "True", "TEST.BNEXT.SMART_BATCH_NORM", "False"])

"""The end of a worker that others end: on Ctrl-C once and orderly, and with the process that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["GRACE_SECONDS", "end_with_parent", "holding_back_interrupts", "interrupt_once", "take_interrupts_once"]

GRACE_SECONDS = 15.0  # to put things in order after an interruption


@contextlib.contextmanager
def holding_back_interrupts() -> Iterator[None]:
    """Keep Ctrl-C waiting within the block, and in processes that start there until `take_interrupts_once`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_interrupts_once() -> None:
    """Let the first Ctrl-C raise KeyboardInterrupt in this process, and no other one disturb what follows."""
    signal.signal(signal.SIGINT, interrupt_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """A handler of Ctrl-C: KeyboardInterrupt for the first, nothing for those after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def end_with_parent(parent: int) -> None:
    """End this process when its parent has died, even by SIGKILL: at once if that is so already, else by Ctrl-C.

    Args:
        parent: the process that started this one.

    Note:
        Linux's signal for the death of a parent comes too late where it died before one could ask for it.
    """
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), name="bnext-watch-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)

    main: int = threading.main_thread().ident  # type: ignore[assignment]  # it has been started
    signal.pthread_kill(main, signal.SIGINT)  # of the process, another thread might get it, and the main one sleep on
    time.sleep(GRACE_SECONDS)
    os._exit(1)  # it is stuck, in a collective say

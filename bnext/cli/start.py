"""The first import of every command: a quiet Ctrl-C while the others are imported, and text in UTF-8 in every locale.

It acts where `bnext` or a file of `tools/` is run, and in the workers that such a run starts. Standard library only.
"""

from __future__ import annotations

import locale
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

__all__ = ["TOOLS"]

PACKAGE = Path(__file__).resolve().parents[1]
TOOLS = PACKAGE.parent / "tools"  # of a checkout


def is_run() -> bool:
    """Whether this process runs a command: the script `bnext`, `python -m bnext`, or a file of `tools/`."""
    script = Path(sys.argv[0]).resolve()
    return script.stem == PACKAGE.name or script == PACKAGE / "__main__.py" or script.parent == TOOLS


def use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale cannot express every file name and message."""
    encoding = locale.getpreferredencoding(False).replace("-", "").replace("_", "").lower()
    if encoding != "utf8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # for the workers as well
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def end_on_interrupt(number: int, frame: object) -> None:
    """One line and the status of Ctrl-C; `run_command` puts its own way in the place of this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one says nothing more
    os.write(2, b"interrupted.\n")
    os._exit(130)


def is_spawned() -> bool:
    """Whether this is a worker, or a process that loads images, which imports the tool of the run that started it."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)  # parent_process() is not set yet


def end_with(parent: int) -> None:
    """End this process when the one that started it has died, unless it takes interrupts by now.

    Then it has something to put in order, for which bnext.engine.interrupts cares.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        os._exit(1)


def require_folder() -> None:
    """One line where the working directory is gone, which torch's libraries would end with words of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        text = "error: The working directory must exist; it was removed. Change into another folder and start again."
        print(text, file=sys.stderr)
        sys.exit(2)


def start() -> None:
    if is_spawned():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever has started it ends it, too
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        return

    require_folder()
    use_utf8()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_on_interrupt)


if is_run():
    start()

"""One attempt: something is damaged, the product is used as a user would, and what came of it is judged.

An attempt runs in a process of its own, which is forked from one that has imported everything: it starts in
milliseconds, and may crash, hang, fill the memory or close its streams without harm to the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["BAD", "Attempt", "Outcome", "Report", "Verdict", "run_all"]

MEMORY = 3 * 2**30  # bytes that an attempt may take, besides the addresses that are taken before it starts
SECONDS = 120.0


class Verdict:
    """The verdicts on attempts."""

    RIGHT = "right"  # it worked, and its numbers are those of the undamaged case, or follow from the input
    SAID = "said"  # it worked, and a warning names the damage
    REFUSED = "refused"  # one line names the damage, before anything was done
    WRONG = "silently wrong"
    BLAMED = "wrong blame"  # refused, but the line names something else
    TRACEBACK = "traceback"
    HANG = "hang"
    CRASH = "crash"


BAD = (Verdict.WRONG, Verdict.BLAMED, Verdict.TRACEBACK, Verdict.HANG, Verdict.CRASH)


class Outcome(NamedTuple):
    """Verdict, and a line that says what was seen."""

    verdict: str
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A damage, and the use of the product with it.

    Args:
        name: the damage, in words.
        run: uses the product in an empty folder, which is the working directory, too; an exception is a traceback.
        seconds: after which it hangs.
    """

    name: str
    run: Callable[[Path], Outcome]
    seconds: float = SECONDS


@dataclasses.dataclass(frozen=True)
class Report:
    """One attempt that was made."""

    number: int
    name: str
    verdict: str
    text: str
    seconds: float


def run_all(attempts: Iterable[tuple[int, Attempt]], num_processes: int = 2) -> Iterator[Report]:
    """Make the attempts, several at a time; a report comes as soon as its attempt has ended.

    One thread does all of it, as a process is forked with the locks that other threads hold.
    """
    waiting = iter(attempts)
    running: list[_Child] = []

    while True:
        for number, attempt in itertools.islice(waiting, num_processes - len(running)):
            running.append(_Child(number, attempt))
        if not running:
            return

        ended = [child for child in running if child.has_ended()]
        for child in ended:
            running.remove(child)
            yield child.report()
        if not ended:
            time.sleep(0.005)


class _Child:
    """A forked process that makes one attempt."""

    def __init__(self, number: int, attempt: Attempt) -> None:
        self.number = number
        self.attempt = attempt
        self.folder = Path(tempfile.mkdtemp(prefix="fault-"))
        self.answer = self.folder / "outcome.json"
        self.start = time.monotonic()
        self.status: int | None = None  # None: it has been killed, as its time was over

        work = self.folder / "work"
        work.mkdir()
        self.pid = os.fork()
        if self.pid == 0:
            _run_in_child(attempt, work, self.answer)

    def has_ended(self) -> bool:
        """Whether it has; it is killed when its time is over."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = status
            return True
        if time.monotonic() - self.start < self.attempt.seconds:
            return False

        _kill_group(self.pid)
        os.waitpid(self.pid, 0)
        return True

    def report(self) -> Report:
        """The report; its processes and its folder are gone afterwards."""
        seconds = time.monotonic() - self.start
        log = self.folder / "log"

        _kill_group(self.pid)
        if self.status is None:
            outcome = Outcome(Verdict.HANG, f"after {seconds:.0f} s: {_last_line(log)}")
        elif not self.answer.exists():
            outcome = Outcome(Verdict.CRASH, f"status {self.status}: {_last_line(log)}")
        else:
            outcome = Outcome(*json.loads(self.answer.read_text()))

        shutil.rmtree(self.folder, ignore_errors=True)
        return Report(self.number, self.attempt.name, outcome.verdict, outcome.text[:400], seconds)


def _kill_group(pid: int) -> None:
    """The process, and those that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _run_in_child(attempt: Attempt, work: Path, answer: Path) -> None:
    """Never returns: what the parent would do afterwards is not done twice."""
    try:
        os.setpgid(0, 0)
        faulthandler.disable()  # of pytest, which would print where a crash is wanted
        log = os.open(answer.with_name("log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        limit = _count_addresses() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(work)

        try:
            outcome = attempt.run(work)
        except BaseException as error:
            traceback.print_exc()
            outcome = Outcome(Verdict.TRACEBACK, describe(error))

        answer.write_text(json.dumps(outcome))
    finally:
        sys.stdout.flush()
        os._exit(0)


def _count_addresses() -> int:
    """Bytes of addresses of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def describe(error: BaseException) -> str:
    """Type, message and the place where it was raised, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''} [{place}]"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")

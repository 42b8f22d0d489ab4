"""A training that is killed at a step of saving, and then resumed: the same weights as without a break."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np

from tests import tiny
from tests.faults import use
from tests.faults.attempt import Attempt, Outcome, Verdict
from tests.faults.folders import _compare
from tests.faults.trained import ITERATIONS, make_trained, tiny_data

__all__ = ["make_attempts"]

OPTS = ("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 2)
# Files that a save touches, by part of their names, as the interpreter's audit events tell them.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.replace")


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """Killed before the n-th event of saving, of all that there are, and at random moments in between."""
    make_trained()
    draw = np.random.default_rng(seed)
    attempts = []
    for index in range(count):
        number = index // 2 + 1
        delay = 0.0 if index % 2 == 0 else float(draw.uniform(0, 0.004))
        attempts.append(
            Attempt(f"killed at event {number}, {delay * 1000:.1f} ms later", partial(_kill, number, delay))
        )
    return attempts


def _kill(number: int, delay: float, folder: Path) -> Outcome:
    tiny_data()
    output = folder / "output"

    pid = os.fork()
    if pid == 0:
        _train_until_killed(output, number, delay)
    _, status = os.waitpid(pid, 0)
    was_killed = os.WIFSIGNALED(status)

    options = ("--resume",) if output.exists() else ()
    run = use.train(output, *OPTS, options=options)
    if run.raised:
        return Outcome(Verdict.TRACEBACK, run.raised)
    if run.is_refused:
        return Outcome(Verdict.BLAMED, f"it could be resumed: {run.error}")

    outcome = _compare(output / "model_final.pth", make_trained() / "output" / "model_final.pth", run)
    if outcome.verdict == Verdict.SAID:
        return Outcome(Verdict.WRONG, "other weights")
    return outcome._replace(text="" if was_killed else "there are fewer events")


def _train_until_killed(output: Path, number: int, delay: float) -> None:
    """Never returns: a training that ends itself, without a word, before a file event in its output folder."""
    seen = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(output) in str(args[0]):
            seen += 1
            if seen == number:
                if delay:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.setitimer(signal.ITIMER_REAL, delay)
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(watch)
        use.train(output, *OPTS, config=str(tiny.CONFIG))
    finally:
        os._exit(0)

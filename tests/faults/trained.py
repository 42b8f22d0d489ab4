"""One small training, made once in a process of its own, whose output folder the attempts copy and damage."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from tests import tiny
from tests.faults import use
from tests.faults.attempt import Attempt, Outcome, Verdict, run_all

__all__ = ["DATA", "ITERATIONS", "make_trained", "tiny_data"]

ITERATIONS = 4
DATA = "data"


@functools.cache
def make_trained() -> Path:
    """A folder with `data` and `output`, a training of ITERATIONS iterations that saved at each second one."""
    folder = Path(tempfile.mkdtemp(prefix="fault-trained-"))
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))

    def run(_: Path) -> Outcome:
        tiny.prepare(folder / DATA)
        use.train(folder / "output", "SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 2)
        return Outcome(Verdict.RIGHT)

    reports = list(run_all([(0, Attempt("training", run))]))
    if not (folder / "output" / "model_final.pth").exists():
        raise RuntimeError(f"the training failed: {reports[0]}")
    return folder


def tiny_data() -> None:
    """Let the catalog point to the data of the training."""
    tiny.register(make_trained() / DATA)

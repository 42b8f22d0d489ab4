"""Seconds until a command answers, and until a training begins with its first step: imports, checks, build."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness import Setting
from bench.record import Quantity, Result
from bnext.data.catalog import ensure_digits
from bnext.errors import BNextError, Refusal

__all__ = ["ROWS", "Start"]

NUM_RUNS = 5
CONFIG = "Digits-Detection/retinanet_R_18_FPN.yaml"
IMPORTS = "import detectron2.engine, detectron2.evaluation, detectron2.modeling"

NO_START = Refusal(BNextError, "a command", "come to its mark", "Run it by hand, and mend what it says.")


@dataclass(frozen=True)
class Start:
    """Seconds of a fresh process, the median of `NUM_RUNS` runs.

    Args:
        name: of the row.
        arguments: of Python; "{output}" is an empty folder.
        mark: in a line of its output, at which the process is ended; "": it is run to its end.
    """

    name: str
    arguments: Sequence[str]
    mark: str = ""
    peer = ""

    def run(self, setting: Setting) -> list[Result]:
        """One quantity.

        Raises:
            BNextError: the command fails.
        """
        ensure_digits()
        seconds = [self.time() for _ in range(NUM_RUNS)]
        return [Quantity(self.name, "", "", "seconds", statistics.median(seconds))]

    def time(self) -> float:
        """Seconds of one run."""
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, *(argument.format(output=output) for argument in self.arguments)]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            start = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            ) as process:
                last = ""
                for line in process.stdout or ():
                    last = line
                    if self.mark and self.mark in line:
                        seconds = time.perf_counter() - start
                        process.kill()
                        return seconds

            seconds = time.perf_counter() - start
            if self.mark or process.returncode != 0:
                raise NO_START.of(f"status {process.returncode}: {last.strip()}", self.name)
            return seconds


TRAIN = ["-m", "bnext", "train", "--config-file", CONFIG, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "{output}/run"]

ROWS = [
    Start("imports of torch and Detectron2 alone", ["-c", IMPORTS]),
    Start("`bnext --help`", ["-m", "bnext", "--help"]),
    Start("`bnext doctor` of a RetinaNet's config", ["-m", "bnext", "doctor", "--config-file", CONFIG]),
    Start("`bnext train` of a RetinaNet until its first step", TRAIN, mark="Starting training from iteration"),
]

"""The product as a user has it: its commands, on a small training; and what a command said."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import tiny
from tests.faults.attempt import Outcome, Verdict, describe

__all__ = ["Run", "judge", "run_tool", "train"]

CONFIG = str(tiny.CONFIG)


@dataclasses.dataclass(frozen=True)
class Run:
    """The end of a command: its status, the line of its error, a traceback if there was one, and all that it said."""

    status: int
    error: str
    raised: str
    log: str

    @property
    def is_refused(self) -> bool:
        return self.status == 2 and bool(self.error)

    def says(self, *words: str) -> bool:
        """Whether a warning has one of these words."""
        warnings = [line for line in self.log.splitlines() if "WARN" in line]
        return any(word.lower() in line.lower() for line in warnings for word in words)


def run_tool(name: str, argv: Sequence[str]) -> Run:
    """Run tools/<name>.py in this process."""
    prints, errors = io.StringIO(), io.StringIO()
    raised, status = "", 1
    with contextlib.redirect_stdout(prints), contextlib.redirect_stderr(errors):
        try:
            status = _load_tool(name).main(list(argv))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            raised = describe(error)

    said = errors.getvalue()
    lines = [line for line in said.splitlines() if line.startswith("error:") or ": error:" in line]
    return Run(status, lines[-1] if lines else "", raised, prints.getvalue() + said)


def _load_tool(name: str):
    sys.path.insert(0, str(tiny.ROOT / "tools"))
    spec = importlib.util.spec_from_file_location(name, tiny.ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(output: Path | str, *opts: object, config: str = CONFIG, options: Sequence[str] = ()) -> Run:
    """tools/train_net.py with the small config, two iterations, and overrides."""
    pairs = ["OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "2", *map(str, opts)]
    return run_tool("train_net", ["--config-file", config, *options, *pairs])


def judge(run: Run, output: Path | str, culprits: Sequence[str], *, must_be_told: bool) -> Outcome:
    """The verdict on a training that may have been refused.

    Args:
        run: of the command.
        output: its output folder.
        culprits: words, of which a refusal or a warning has to name one.
        must_be_told: nothing right can come of the damage, or not without a warning.
    """
    if run.raised:
        return Outcome(Verdict.TRACEBACK, run.raised)
    if run.is_refused:
        is_named = any(word.lower() in run.error.lower() for word in culprits)
        is_late = Path(output, "model_final.pth").exists()
        if is_late:
            return Outcome(Verdict.TRACEBACK, f"refused after the training: {run.error}")
        return Outcome(Verdict.REFUSED if is_named else Verdict.BLAMED, run.error)
    if run.status != 0:
        return Outcome(Verdict.TRACEBACK, f"status {run.status}: {run.log[-200:]}")

    if not _has_finite_losses(output):
        return Outcome(Verdict.WRONG, "losses are not finite, and nothing was said")
    if run.says(*culprits):
        return Outcome(Verdict.SAID)
    return Outcome(Verdict.WRONG if must_be_told else Verdict.RIGHT, "trained without a word" if must_be_told else "")


def _has_finite_losses(output: Path | str) -> bool:
    metrics = Path(output, "metrics.json")
    if not metrics.exists():
        return True
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if "loss" in key]
    return all(value is not None and math.isfinite(value) for value in losses)

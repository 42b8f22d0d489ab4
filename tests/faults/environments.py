"""Odd environments of a whole process: variables, limits, streams, folders, signals."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests import tiny
from tests.faults.attempt import Attempt, Outcome, Verdict
from tests.faults.trained import DATA, make_trained

__all__ = ["make_attempts"]

SECONDS = 240
TOOL = f"{sys.executable} {tiny.ROOT / 'tools' / 'train_net.py'}"
SCRIPT = f"{Path(sys.executable).with_name('bnext')} train"
MODULE = f"{sys.executable} -m bnext train"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how a process runs.

    Args:
        name: in words.
        variables: of its environment; None takes one away.
        shell: the command line, in which {command} stands for the training.
        prepare: is called in the new process before the program.
        must_work: it has to train; else one line will do.
        statuses: with which it may end.
        program: the training, but for its arguments.
    """

    name: str
    variables: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    shell: str = "{command}"
    prepare: Callable[[], object] | None = None
    must_work: bool = True
    statuses: tuple[int, ...] = (0, 2)
    program: str = TOOL


def _limit(which: int, value: int) -> Callable[[], object]:
    return lambda: resource.setrlimit(which, (value, value))


PLACES = (
    Place("nothing odd"),
    Place("LC_ALL=C", {"LC_ALL": "C"}),
    Place("LC_ALL=POSIX without UTF-8 mode", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    Place("ASCII streams", {"PYTHONIOENCODING": "ascii"}),
    Place("an unknown locale", {"LC_ALL": "xx_YY"}),
    Place("a Turkish locale's name", {"LANG": "tr_TR.UTF-8"}),
    Place("no HOME", {"HOME": None}),
    Place("HOME not there", {"HOME": "/nonexistent"}),
    Place("TMPDIR not there", {"TMPDIR": "/nonexistent"}),
    Place("no PATH", {"PATH": ""}),
    Place("TERM dumb", {"TERM": "dumb"}),
    Place("no TERM", {"TERM": None}),
    Place("COLUMNS in words", {"COLUMNS": "wide"}),
    Place("COLUMNS 1", {"COLUMNS": "1"}),
    Place("a hash seed", {"PYTHONHASHSEED": "7"}),
    Place("python -O", {"PYTHONOPTIMIZE": "1"}),
    Place("warnings are errors of others", {"PYTHONWARNINGS": "default"}),
    Place("no bytecode", {"PYTHONDONTWRITEBYTECODE": "1"}),
    Place("8 threads", {"OMP_NUM_THREADS": "8"}),
    Place("threads in words", {"OMP_NUM_THREADS": "many"}),
    Place("no device is visible", {"CUDA_VISIBLE_DEVICES": ""}),
    Place("a device that is not there", {"CUDA_VISIBLE_DEVICES": "7"}),
    Place("RANK alone", {"RANK": "1"}),
    Place("WORLD_SIZE alone", {"WORLD_SIZE": "4"}),
    Place("a launcher's variables in words", {"RANK": "a", "WORLD_SIZE": "b", "LOCAL_RANK": "c"}, must_work=False),
    Place("MPLBACKEND unknown", {"MPLBACKEND": "none_such"}),
    Place("data sets not there", {"DETECTRON2_DATASETS": "/nonexistent"}, must_work=False),
    Place("data sets a file", {"DETECTRON2_DATASETS": "/etc/passwd"}, must_work=False),
    Place("data sets empty", {"DETECTRON2_DATASETS": ""}, must_work=False),
    Place("stdin closed", shell="{command} <&-"),
    Place("stdout closed", shell="{command} >&-"),
    Place("stderr closed", shell="{command} 2>&-"),
    Place("all streams closed", shell="{command} <&- >&- 2>&-"),
    Place("stdout full", shell="{command} >/dev/full", must_work=False),
    Place("stderr full", shell="{command} 2>/dev/full", must_work=False, statuses=(0, 1, 2, 120)),
    Place("read by head", shell="{command} | head -1", must_work=False),
    Place("few open files", prepare=_limit(resource.RLIMIT_NOFILE, 64)),
    Place("small files", prepare=_limit(resource.RLIMIT_FSIZE, 100_000), must_work=False),
    Place("nice and no hangup", shell="nohup nice {command}"),
    Place(
        "interrupted while it imports", shell="timeout -s INT 2 {command}", must_work=False, statuses=(0, 2, 124, 130)
    ),
    Place(
        "interrupted while it trains", shell="timeout -s INT 6 {command}", must_work=False, statuses=(0, 2, 124, 130)
    ),
    Place("ended while it trains", shell="timeout -s TERM 6 {command}", must_work=False, statuses=(0, 2, 124, 143)),
    Place(
        "the folder is gone",
        shell="d=$(mktemp -d) && cd $d && rmdir $d && {command}",
        must_work=False,
        statuses=(0, 1, 2),
    ),
    Place(
        "the script under LC_ALL=POSIX without UTF-8 mode",
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        program=SCRIPT,
    ),
    Place("the script without PATH and HOME", {"PATH": "", "HOME": None}, program=SCRIPT),
    Place("the script on two workers", program=f"{SCRIPT} --num-gpus 2"),
    Place(
        "the script interrupted while it imports",
        shell="timeout -s INT 2 {command}",
        must_work=False,
        statuses=(0, 2, 124, 130),
        program=SCRIPT,
    ),
    Place("the module in the C locale", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, program=MODULE),
)


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """The places, one after another; nothing is drawn."""
    make_trained()
    return [
        Attempt(PLACES[index % len(PLACES)].name, partial(_run, PLACES[index % len(PLACES)]), SECONDS + 30)
        for index in range(count)
    ]


def _run(place: Place, folder: Path) -> Outcome:
    variables = {**os.environ, "DETECTRON2_DATASETS": str(make_trained() / DATA), "PYTHONPATH": str(tiny.ROOT)}
    for name, value in place.variables.items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value

    output = folder / "output"
    command = f"{place.program} --config-file {tiny.CONFIG} OUTPUT_DIR {output} SOLVER.MAX_ITER 2"
    line = f"exec {command}" if place.shell == "{command}" else place.shell.format(command=command)
    process = subprocess.Popen(
        ["/bin/bash", "-c", line],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=place.prepare,
        restore_signals=True,
    )
    try:
        prints, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return Outcome(Verdict.HANG)
    return _judge(place, output, process.returncode, prints.decode(errors="replace"), errors.decode(errors="replace"))


def _judge(place: Place, output: Path, status: int, prints: str, errors: str) -> Outcome:
    if "Traceback (most recent call last)" in errors + prints:
        lines = [line for line in (errors + prints).splitlines() if line.strip()]
        return Outcome(Verdict.TRACEBACK, lines[-1])
    if (output / "model_final.pth").exists():
        return Outcome(Verdict.RIGHT)

    told = [line for line in errors.splitlines() if line.startswith(("error:", "interrupted"))]
    if place.must_work:
        return Outcome(Verdict.BLAMED, f"it had to train; status {status}: {errors[-200:]}")
    if status not in place.statuses:
        return Outcome(Verdict.BLAMED, f"status {status}: {errors[-200:]}")
    if told or "2>" in place.shell or "SIG" in errors or status in (124, 143) or "head" in place.shell:
        return Outcome(Verdict.REFUSED, told[-1] if told else "")
    return Outcome(Verdict.WRONG, f"status {status} and no word: {errors[-200:]}")

"""A short share of the injected faults of most kinds; all of them where slow tests run."""

import json
import subprocess
import sys

import pytest

from tests import tiny
from tests.faults.__main__ import KINDS
from tests.faults.attempt import BAD, Attempt, Outcome, Verdict, run_all

SHORT = {"configs": 2, "checkpoints": 2, "datasets": 2, "numerics": 30}  # folders and kills are slow ones


def inject(tmp_path, kinds, *options, seconds):
    """Reports of a process of its own: one that has imported torch, and trained nothing."""
    output = tmp_path / "reports.json"
    command = [sys.executable, "-m", "tests.faults", *kinds, "--output", str(output), *options]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=seconds)
    assert output.exists(), done.stderr[-2000:]
    return json.loads(output.read_text())["reports"]


def name_bad(reports):
    return [
        f"{kind} {report['number']}: {report['verdict']}: {report['name']}: {report['text']}"
        for kind, made in reports.items()
        for report in made
        if report["verdict"] in BAD
    ]


def test_a_share_of_most_kinds(tmp_path):
    counts = [f"{kind}={count}" for kind, count in SHORT.items()]
    reports = inject(tmp_path, counts, seconds=300)
    assert {kind: len(made) for kind, made in reports.items()} == SHORT
    assert name_bad(reports) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_kind(tmp_path, kind):
    reports = inject(tmp_path, [kind], seconds=3600)
    assert len(reports[kind]) == KINDS[kind][0]
    assert name_bad(reports) == []


def hang(folder):
    while True:
        pass


def fail(folder):
    raise KeyError("area")


def crash(folder):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSEGV)


def fill(folder):
    return Outcome(Verdict.RIGHT, str(len(bytearray(2**40))))


@pytest.mark.parametrize(
    ("run", "verdict"),
    [(hang, Verdict.HANG), (fail, Verdict.TRACEBACK), (crash, Verdict.CRASH), (fill, Verdict.TRACEBACK)],
)
def test_what_goes_wrong_in_an_attempt_is_seen(run, verdict):
    (report,) = run_all([(0, Attempt("", run, seconds=0.5))])
    assert report.verdict == verdict
    assert "area" in report.text or run is not fail

"""Inject faults and print a table of what came of them: `python -m tests.faults [kind ...]`."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from tqdm import tqdm

from bnext.tables import format_rows
from tests.faults.attempt import BAD, Attempt, Report, Verdict, run_all

# Kind -> how many attempts, and what their table says of them.
KINDS: dict[str, tuple[int, str]] = {
    "configs": (400, "damaged or misused configs, trained"),
    "checkpoints": (150, "damaged or foreign weights, loaded"),
    "datasets": (197, "faulty data sets, trained and evaluated"),
    "folders": (35, "damaged output folders, resumed"),
    "environments": (48, "odd environments, whole processes"),
    "numerics": (2000, "norms and inputs against float64"),
    "kills": (60, "killed at a step of a save, resumed"),
}


def main(argv: list[str] | None = None) -> int:
    """Status 1 if any attempt came out badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = f"{', '.join(KINDS)}, or, as in kills=5, with the number of attempts; all of them by default"
    parser.add_argument("kinds", nargs="*", metavar="kind", help=kinds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one attempt, to repeat it")
    parser.add_argument("--output", help="JSON file for the reports")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    counts = {}
    for word in args.kinds or KINDS:
        kind, _, count = word.partition("=")
        counts[kind] = int(count) if count else KINDS[kind][0]

    reports = {kind: run_kind(kind, count, args) for kind, count in counts.items()}

    print(make_table(reports))
    if args.output:
        rows = {kind: [dataclasses.asdict(report) for report in made] for kind, made in reports.items()}
        Path(args.output).write_text(json.dumps({"seed": args.seed, "reports": rows}, indent=1))
    return int(any(report.verdict in BAD for made in reports.values() for report in made))


def run_kind(kind: str, count: int, args: argparse.Namespace) -> list[Report]:
    """Make the attempts of one kind; what came out badly is printed at once."""
    attempts: list[Attempt] = importlib.import_module(f"tests.faults.{kind}").make_attempts(count, args.seed)
    numbered = list(enumerate(attempts))
    if args.only is not None:
        numbered = [numbered[args.only]]

    reports = []
    bar = tqdm(run_all(numbered, args.processes), kind, len(numbered), disable=not sys.stderr.isatty())
    for report in bar:
        reports.append(report)
        if report.verdict in BAD or args.only is not None:
            bar.write(f"{kind} {report.number}: {report.verdict}: {report.name}: {report.text}", file=sys.stdout)
            sys.stdout.flush()
    return reports


def make_table(reports: dict[str, list[Report]]) -> str:
    """A row for each kind: how many attempts, and how many of each verdict."""
    verdicts = [Verdict.RIGHT, Verdict.SAID, Verdict.REFUSED, *BAD]
    rows = []
    for kind, made in reports.items():
        counted = collections.Counter(report.verdict for report in made)
        seconds = sum(report.seconds for report in made)
        rows.append([kind, str(len(made)), *(str(counted[verdict]) for verdict in verdicts), f"{seconds:.0f}"])
    return format_rows(rows, ["kind", "attempts", *verdicts, "seconds"])


if __name__ == "__main__":
    start = time.monotonic()
    status = main()
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(status)

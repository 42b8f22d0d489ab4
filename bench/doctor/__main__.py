"""Planted faults x tools: found, missed, false alarms, seconds.

    python -m bench.doctor
    python -m bench.doctor --json output/doctor_bench.json --markdown docs/doctor_bench.md

Peers that are not installed are left out, and said: pip install torch-audit neural-net-checklist model-clinic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import bench.doctor.planted_in_training  # noqa: F401  fills PATIENTS, as `planted` does, which it imports
from bench.doctor.case import PATIENTS, Patient
from bench.doctor.healthy import list_healthy
from bench.doctor.tools import TOOLS, find_version, silent
from bnext.cli.run_command import run_command
from bnext.files import replace_file, write_json
from bnext.tables import format_rows

_SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.doctor", description=__doc__, formatter_class=as_written)
    parser.add_argument("--json", metavar="FILE", help="write all answers there")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there")
    parser.add_argument("--only", metavar="TEXT", default="", help="patients whose code, library or name has it")
    args = parser.parse_args(argv)
    return run_command(lambda: compare_tools(args.only, args.json, args.markdown))


def compare_tools(only: str = "", json_file: str | None = None, markdown: str | None = None) -> None:
    """Ask every tool about every model, print the tables, and write them where they are asked for."""
    patients = [*PATIENTS, *list_healthy()]
    chosen = [each for each in patients if only in f"{each.code} {each.library} {each.name}"]
    tools = [tool for tool in TOOLS if find_version(tool)]

    answers = [_ask_all(each, tools) for each in tqdm(chosen, disable=None)]
    tables = format_tables(answers, tools)
    print(tables)
    if json_file is not None:
        versions = {tool: find_version(tool) for tool in tools}
        write_json(json_file, {"torch": torch.__version__, "versions": versions, "answers": answers})
    if markdown is not None:
        replace_file(markdown, lambda file: file.write(tables.encode()))


def _ask_all(patient: Patient, tools: Sequence[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {"name": patient.name, "code": patient.code, "library": patient.library, "tools": {}}
    torch.manual_seed(_SEED)
    case = patient.make()  # no tool changes it
    for tool in tools:
        start = time.perf_counter()
        failure = ""
        try:
            with silent():
                codes = sorted(TOOLS[tool](case))
        except Exception as error:
            codes, failure = [], f"{type(error).__name__}: {error}".splitlines()[0]
        seconds = time.perf_counter() - start
        answer["tools"][tool] = {"codes": codes, "seconds": round(seconds, 3), "failure": failure}
    return answer


def format_tables(answers: Sequence[dict[str, Any]], tools: Sequence[str]) -> str:
    """The sums by tool, and a row for each model."""
    planted = [answer for answer in answers if answer["code"]]
    healthy = [answer for answer in answers if not answer["code"]]

    sums = []
    for tool in tools:
        found = sum(_has_found(answer, tool) for answer in planted)
        alarms = sum("alarm" in answer["tools"][tool]["codes"] for answer in healthy)
        failed = sum(bool(answer["tools"][tool]["failure"]) for answer in answers)
        seconds = statistics.median(answer["tools"][tool]["seconds"] for answer in answers)
        name = f"{tool} {find_version(tool)}"
        sums.append([name, f"{found} of {len(planted)}", f"{alarms} of {len(healthy)}", str(failed), f"{seconds:.2f}"])
    headers = ["tool", "faults found", "false alarms on healthy models", "could not run", "seconds (median)"]

    rows = []
    for answer in answers:
        marks = [_mark(answer, tool) for tool in tools]
        rows.append([answer["code"] or "healthy", answer["library"], answer["name"], *marks])
    table = format_rows(rows, ["code", "library", "model", *tools], num_texts=3 + len(tools))
    return f"{format_rows(sums, headers)}\n\n{table}\n"


def _has_found(answer: dict[str, Any], tool: str) -> bool:
    return answer["code"] in answer["tools"][tool]["codes"]


def _mark(answer: dict[str, Any], tool: str) -> str:
    result = answer["tools"][tool]
    if result["failure"]:
        return "failed"
    if answer["code"]:
        return "found" if _has_found(answer, tool) else "-"
    return "false alarm" if "alarm" in result["codes"] else "-"


if __name__ == "__main__":
    sys.exit(main())

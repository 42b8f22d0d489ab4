"""The options of `bnext doctor` for its report: form, file, exit status, and the checks themselves."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bnext.cli.output_file import find_folder_faults
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_html import format_html
from bnext.diagnostics.reports.report_json import format_json
from bnext.diagnostics.reports.report_sarif import format_sarif
from bnext.diagnostics.reports.report_text import explain_check, format_text, list_checks, summarize
from bnext.errors import ConfigError
from bnext.files import replace_file
from bnext.progress import is_terminal
from bnext.text import flatten_text, suggest

__all__ = ["add_report_arguments", "check_report", "give_report", "keeping_output_clean", "tell_of_checks"]

_BY_ENDING = {".txt": "text", ".log": "text", ".json": "json", ".html": "html", ".sarif": "sarif"}
_MOST_WIDTH = 120  # letters
_FORMATS = ("text", "json", "html", "sarif")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the report."""
    add = parser.add_argument
    add("--format", choices=_FORMATS, help="of the report (default: by the ending of --output, else text)")
    add("--output", metavar="FILE", help=f"where the report is written ({', '.join(_BY_ENDING)}), instead of shown")
    add(
        "--all",
        action="store_true",
        help="all norms and all advice in the text, also where they are more than a screen",
    )
    add("--fail-on", choices=("error", "warning"), help="end with status 1 if there is a finding as bad as that")
    add("--list", action="store_true", help="show all checks with their codes, and end")
    add("--explain", metavar="CODE", help="show what a code means, such as BN001, and end")


def tell_of_checks(args: argparse.Namespace) -> bool:
    """Show what --list or --explain ask for; whether one of them was given.

    Raises:
        ConfigError: there is no such code.
    """
    checks = find_checks()
    if args.explain is not None:
        word = args.explain.strip()
        number = re.fullmatch(r"(?:BN)?0*([1-9]\d*)", word, re.IGNORECASE)
        code = f"BN{number[1]:>03}" if number else word.upper()
        by_name = {check.name: check for check in checks.values()}
        check = checks.get(code) or by_name.get(word.lower().replace("_", "-"))
        if check is None:
            remedy = suggest(code, checks, "See bnext doctor --list.")
            raise ConfigError.of("--explain", "be the code of a check", got=repr(args.explain), remedy=remedy)
        print(explain_check(check, _find_width()))
    elif args.list:
        print(list_checks(list(checks.values())))
    return args.explain is not None or args.list


def check_report(args: argparse.Namespace) -> None:
    """Find the format of the report, and see that its file can be written, before anything takes time.

    Args:
        args: `format` is filled in.

    Raises:
        ConfigError: the file cannot be written.
    """
    ending = Path(args.output).suffix.lower() if args.output is not None else ""
    if args.output is not None:
        if ending not in _BY_ENDING:
            remedy = "Choose a name that is one of a report."
            rule = f"end in {', '.join(_BY_ENDING)}"
            raise ConfigError.of("--output", rule, got=repr(args.output), remedy=remedy)
        for fault in find_folder_faults(args.output):
            raise fault
        if os.path.isdir(args.output):
            remedy = "Choose another name."
            raise ConfigError.of("--output", "be a file", got=f"{args.output!r}, a folder", remedy=remedy)
    args.format = args.format or _BY_ENDING.get(ending, "text")


@contextlib.contextmanager
def keeping_output_clean() -> Iterator[None]:
    """Within the block what is printed goes to the standard error stream: the other one has the report alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def give_report(args: argparse.Namespace, diagnosis: Diagnosis) -> int:
    """Show or write the report.

    Args:
        args: as `check_report` leaves them.
        diagnosis: see `Diagnosis`.

    Returns:
        The exit status: 1 where --fail-on is met.
    """
    status = 1 if args.fail_on and diagnosis.select(args.fail_on) else 0
    text = _format(args, diagnosis, status)
    if args.output is None:
        print(text, flush=True)
        return status

    content = f"{text}\n".encode("utf-8", "backslashreplace")
    replace_file(args.output, lambda file: file.write(content))
    print(f"{summarize(diagnosis)}. The report is {flatten_text(args.output)}.", file=sys.stderr)
    return status


def _format(args: argparse.Namespace, diagnosis: Diagnosis, status: int) -> str:
    if args.format == "json":
        return format_json(diagnosis)
    if args.format == "sarif":
        return format_sarif(diagnosis, status=status, config_file=args.config_file)
    if args.format == "html":
        return format_html(diagnosis)

    is_shown = args.output is None and is_terminal(sys.stdout)
    has_colors = is_shown and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    is_complete = args.all or args.output is not None
    return format_text(diagnosis, width=_find_width(), has_colors=has_colors, is_complete=is_complete)


def _find_width() -> int:
    """Width of the terminal, as far as lines can be read; 100 where it is none."""
    return min(shutil.get_terminal_size((100, 24)).columns, _MOST_WIDTH) if is_terminal(sys.stdout) else 100

"""Time the norms against the ways to write them with torch and other packages: forward and backward.

    make bench
    python -m bench --only levels --only dealt
    python -m bench --show bench/results/two_cores.json

Every pair of arms is proved equal in float64 before it is timed; where two are not, the others still run, and the exit
status is 1. `make bench` sets malloc's thresholds: by default glibc returns every large tensor to the system after each
operation, which times the kernel and not the norm.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import torch
from tqdm import tqdm

from bench import (
    compiled,
    dealt,
    domains,
    ghost,
    installed,
    levels,
    one_pass,
    over_workers,
    plain_norm,
    starts,
    synchronizations,
    training_steps,
)
from bench.harness import Row, Setting
from bench.pairs import Limits
from bench.picture import draw_record
from bench.record import (
    Failure,
    Record,
    Result,
    check_files,
    describe_setting,
    fill_page,
    format_record,
    read_record,
    write_record,
)
from bnext.cli.run_command import run_command
from bnext.errors import LaunchError, Refusal

CLAIMS: dict[str, ModuleType] = {
    "plain_norm": plain_norm,
    "ghost": ghost,
    "domains": domains,
    "dealt": dealt,
    "levels": levels,
    "over_workers": over_workers,
    "installed": installed,
    "compiled": compiled,
    "synchronizations": synchronizations,
    "starts": starts,
}
SLOW_CLAIMS: dict[str, ModuleType] = {"one_pass": one_pass, "training_steps": training_steps}  # run by --all

NO_GPU = Refusal(
    LaunchError,
    "--device",
    "be a device that PyTorch can use",
    "Use --device cpu, or install a PyTorch with CUDA on a machine with an NVIDIA GPU and its driver.",
)
NOT_MEASURED = Refusal(
    LaunchError, "--show", "come without options of a measurement", "Leave them out, or leave out --show."
)
NO_PAIRS = Refusal(LaunchError, "--pairs", "be 2 or more", "Use 60, or leave it out.")
HELP_OF_PAIRS = "just so many (default: 11 to 60, until a ratio is known to 5 %%, or after 20 s of measured time)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 where arms do not agree, or 2 for a mistake of the user."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=as_written)
    names = [*CLAIMS, *SLOW_CLAIMS]
    add = parser.add_argument
    add("--only", action="append", choices=names, help="a claim, may be repeated (default: all that are quick)")
    add("--all", action="store_true", help="the slow claims, too")
    add("--device", choices=("cpu", "cuda"), help="(default: cpu)")
    add("--pairs", type=int, metavar="N", help=HELP_OF_PAIRS)
    add("--json", metavar="FILE", help="write the results there, too")
    add("--plot", metavar="FILE", help="draw the ratios there, as PNG")
    add("--show", metavar="FILE", help="measure nothing; show the results of such a file")
    add("--page", metavar="FILE", help="put what is shown between the marks of a page, too")
    args = parser.parse_args(argv)

    if args.show is not None:
        return run_command(lambda: show(_read_alone(args), args.plot, args.page))
    chosen = args.only or (names if args.all else list(CLAIMS))
    return run_command(lambda: show(_measure_for(args, chosen), args.plot, args.page))


def _read_alone(args: argparse.Namespace) -> Record:
    """The record of --show, which comes without options of a measurement."""
    options = ("only", "all", "device", "pairs", "json")
    given = [f"--{option}" for option in options if getattr(args, option) not in (None, False)]
    if given:
        raise NOT_MEASURED.of(", ".join(given))
    return read_record(args.show)


def _measure_for(args: argparse.Namespace, names: Sequence[str]) -> Record:
    """A measurement whose files can be written."""
    check_files([file for file in (args.json, args.plot) if file is not None], args.page)
    return measure(names, args.device or "cpu", args.pairs, args.json)


def measure(names: Sequence[str], device: str, num_pairs: int | None, file: str | None) -> Record:
    """Measure claims.

    Args:
        names: of claims.
        device: "cpu" or "cuda".
        num_pairs: of each comparison; None: until the ratio is known.
        file: where results are written, as JSON; None: nowhere.

    Raises:
        LaunchError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise NO_GPU.of("cuda, and it finds no GPU")
    if num_pairs is not None and num_pairs < 2:
        raise NO_PAIRS.of(num_pairs)

    limits = Limits() if num_pairs is None else Limits(num_pairs, num_pairs)
    setting = Setting(device, limits)
    record = Record(describe_setting(device, limits))
    rows: list[Row] = []
    for name in names:
        rows += {**CLAIMS, **SLOW_CLAIMS}[name].ROWS
    for row in tqdm(rows, disable=None):
        record.results += _run(row, setting)
        if file is not None:  # after Ctrl-C there is what was measured until then
            write_record(file, record)
    return record


def _run(row: Row, setting: Setting) -> list[Result]:
    """The results of a row; one that fails keeps none of the others from running."""
    try:
        return row.run(setting)
    except Exception as error:
        traceback.print_exc()
        last = next(reversed(str(error).strip().splitlines()), "")  # before it is the traceback of a worker
        return [Failure(row.name, row.peer, "", f"{type(error).__name__}: {last}")]


def show(record: Record, picture: str | None, page: str | None) -> int:
    """Print the tables of a run, and put them where they are asked for.

    Args:
        record: the run.
        picture: where its ratios are drawn, as PNG; None: nowhere.
        page: a file in Markdown, whose text between the marks is replaced; None: none.

    Returns:
        1 if arms do not agree or do not run, else 0.

    Raises:
        BNextError: the page has no marks.
    """
    text = format_record(record)
    print(text)
    if picture is not None:
        draw_record(record, picture)
    if page is not None:
        fill_page(page, text)

    if not record.failures:
        return 0
    print(f"error: {len(record.failures)} comparisons have failed; see FAILED above.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

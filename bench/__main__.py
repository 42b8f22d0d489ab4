"""Time the norms against the ways to write them with torch alone: forward and backward.

    make bench
    python -m bench --only levels --only dealt --json output/bench.json

Every pair of arms is proved equal in float64 before it is timed. `make bench` sets malloc's thresholds: by default
glibc returns every large tensor to the system after each operation, which times the kernel and not the norm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

from bench import dealt, domains, ghost, levels, plain_norm
from bench.harness import NUM_PAIRS, Comparison, Result, format_results, run, write_figures
from bnext.cli.run_command import run_command

CLAIMS = {"plain_norm": plain_norm, "ghost": ghost, "domains": domains, "dealt": dealt, "levels": levels}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=as_written)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", action="append", choices=list(CLAIMS), help="a claim, may be repeated (default: all)")
    args = parser.parse_args(argv)
    return run_command(lambda: run_claims(args.only or list(CLAIMS), args.json))


def run_claims(names: Sequence[str], file: str | None) -> None:
    """Run claims, print their table, and write it if a file is named."""
    comparisons: list[Comparison] = []
    for name in names:
        comparisons += CLAIMS[name].COMPARISONS

    results: list[Result] = []
    for comparison in tqdm(comparisons, disable=None):
        results += run(comparison)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {NUM_PAIRS} pairs of runs, float32")
    print(format_results(results))
    if file is not None:
        write_figures(file, [asdict(result) for result in results])


if __name__ == "__main__":
    sys.exit(main())

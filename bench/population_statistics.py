"""The cost of knowing the shared statistics of a RetinaNet head to 1 %, against fvcore's fixed number of batches.

    python -m bench.population_statistics

Row 1 of the paper's Table 5 on the digits set (made on first use), re-estimated until the standard error is below the
tolerance (95 % of the channels), in batches of 2 and of 8; and fvcore's `update_bn_stats` with 500 batches of 8,
as the paper's project and detectron2 use it, on detectron2's own RetinaNet: fvcore refuses a norm that is reused over
levels. Both re-estimate the norms of the head alone, on the same images and weights, loading included. They are not
equal and no pairs: fvcore's statistics are of each level, and of as many images as it was told, not as it needs; each
runs once, for minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from bench.record import write_figures
from bnext import recompute_population_statistics
from bnext.checkpoints.checkpointer import Checkpointer
from bnext.cli.run_command import run_command
from bnext.config import load_config
from bnext.data.catalog import ensure_digits
from bnext.data.loader import build_train_loader
from bnext.evaluation.reestimate import is_level_norm
from bnext.heads import forward_statistics
from bnext.tables import format_rows

CONFIG = Path(__file__).parents[1] / "projects/RethinkingBatchNorm/configs/digits/table5_row1.yaml"
TOLERANCE = 0.01  # of our runs
NUM_BATCHES, BATCH_SIZE = 500, 8  # of fvcore's run; as many images are our limit


@dataclass(frozen=True)
class Figure:
    """Cost of one re-estimation.

    Args:
        name: of the run.
        num_images: that it took.
        seconds: that it took.
        error: largest standard error of a norm that was reached, relative; None: not told.
        half: images after which half of the norms were below the tolerance, estimated; None: not told.
    """

    name: str
    num_images: int
    seconds: float
    error: float | None = None
    half: float | None = None


def load_batches(batch_size: int) -> Any:
    """The training's images, in its order."""
    return build_train_loader(load_config(str(CONFIG), ["SOLVER.IMS_PER_BATCH", str(batch_size)]))


def make_detectors(weights: str) -> tuple[nn.Module, nn.Module]:
    """Row 1; and detectron2's own, with statistics for each level. Their weights are the same."""
    cfg = load_config(str(CONFIG))
    torch.manual_seed(0)
    ours = build_model(cfg)
    if weights:
        Checkpointer(ours).load(weights, checkpointables=[], complete=True)

    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    theirs = build_model(cfg)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # the statistics of the head have other keys
    return ours, theirs


def reach_tolerance(model: nn.Module, batch_size: int) -> Figure:
    """Ours, until the standard error is below the tolerance."""
    start = time.perf_counter()
    report = recompute_population_statistics(
        model,
        load_batches(batch_size),
        num_samples=NUM_BATCHES * BATCH_SIZE,
        tolerance=TOLERANCE,
        forward=forward_statistics,
        layers=is_level_norm,
    )
    seconds = time.perf_counter() - start

    errors = [estimate.error for estimate in report.reached]
    half = report.num_samples * (statistics.median(errors) / TOLERANCE) ** 2  # errors fall with the root of the number
    name = f"ours, to {100 * TOLERANCE:g} %, batches of {batch_size}"
    return Figure(name, report.num_samples, seconds, max(errors), half)


def run_fvcore(model: Any) -> Figure:
    """fvcore's, which knows no error."""
    model.train()
    model.backbone.eval()

    start = time.perf_counter()
    with EventStorage():
        update_bn_stats(model, load_batches(BATCH_SIZE), NUM_BATCHES)
    seconds = time.perf_counter() - start

    return Figure(f"fvcore, {NUM_BATCHES} batches of {BATCH_SIZE}", NUM_BATCHES * BATCH_SIZE, seconds)


def run_all(weights: str, file: str | None) -> None:
    """Print the table, and write the figures if a file is named."""
    ensure_digits()
    ours, theirs = make_detectors(weights)

    figures = [reach_tolerance(ours, 2), reach_tolerance(ours, BATCH_SIZE), run_fvcore(theirs)]

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(format_figures(figures))
    if file is not None:
        write_figures(file, [asdict(figure) for figure in figures])


def format_figures(figures: Sequence[Figure]) -> str:
    """The table; the last run is what the others are compared with."""
    rows = []
    for figure in figures:
        error = "not told" if figure.error is None else f"{100 * figure.error:.2f} %"
        half = "" if figure.half is None else f"{figure.half:.0f}"
        ratio = figures[-1].seconds / figure.seconds
        rows.append([figure.name, str(figure.num_images), error, half, f"{figure.seconds:.1f}", f"{ratio:.1f}"])

    headers = ["statistics of the head", "images", "standard error", "half need", "seconds", "fvcore / this"]
    return format_rows(rows, headers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m bench.population_statistics", description=__doc__, formatter_class=as_written
    )
    parser.add_argument("--weights", default="", help="a checkpoint of row 1 (default: weights of the beginning)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    return run_command(lambda: run_all(args.weights, args.json))


if __name__ == "__main__":
    sys.exit(main())

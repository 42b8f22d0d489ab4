"""The cost of knowing the shared statistics of a RetinaNet head to 1 %, against fvcore's fixed number of batches.

    python -m bench.population_statistics --weights output/model_final.pth

Row 1 of the paper's Table 5 on the digits set (made on first use), re-estimated until the standard error is below the
tolerance (95 % of the channels), in batches of 2 and of 8; and fvcore's `update_bn_stats` with 500 batches of 8,
as the paper's project and detectron2 use it, on detectron2's own RetinaNet: fvcore refuses a norm that is reused over
levels. Both re-estimate the norms of the head alone, on the same images and weights, loading included. They are not
equal and no pairs: fvcore's statistics are of each level, and of as many images as it was told, not as it needs; each
runs once, for minutes. Of each image fvcore's run takes four looks, as there are 1,000: it is the training set that
both get to know. Of what such images are drawn from all of them tell less, which is in the second table, by level.

Then the time of single batches, in pairs: what both have in common, the backbone, takes most of it here.
"""

from __future__ import annotations

import argparse
import itertools
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
from bnext import convert_norm, recompute_population_statistics
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
NUM_PAIRS, NUM_TIMED = 11, 3  # pairs of passes, and batches in a pass


@dataclass(frozen=True)
class Figure:
    """Cost of one re-estimation.

    Args:
        name: of the run.
        num_images: that it took.
        seconds: that it took.
        error: largest standard error of a norm that was reached, relative; None: not told.
        half: images that half of the norms needed; None: not told.
    """

    name: str
    num_images: int
    seconds: float
    error: float | None = None
    half: float | None = None


@dataclass(frozen=True)
class Need:
    """Images of a level, or of all of them together.

    Args:
        name: of the level.
        error: largest standard error of a norm after all images of the set, for what they are drawn from.
        num_images: that would bring it to the tolerance, estimated: errors fall with the root of the number.
    """

    name: str
    error: float
    num_images: float


def load_batches(batch_size: int) -> Any:
    """The training's images, in its order: each once before any comes again, and always alike."""
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
    batches = load_batches(batch_size)
    start = time.perf_counter()
    report = recompute_population_statistics(
        model,
        batches,
        num_samples=NUM_BATCHES * BATCH_SIZE,
        tolerance=TOLERANCE,
        population_size=batches.num_images,
        forward=forward_statistics,
        layers=is_level_norm,
    )
    seconds = time.perf_counter() - start

    errors = [estimate.error for estimate in report.reached]
    half = statistics.median(estimate.num_samples for estimate in report.reached)  # known ones need no more
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


def count_needs(model: nn.Module) -> list[Need]:
    """Images for the tolerance where each counts as new: of all levels together, and of each by itself."""
    needs = []
    for population in ("shared", "per_level"):
        convert_norm(model, population=population)
        batches = load_batches(BATCH_SIZE)
        report = recompute_population_statistics(
            model, batches, num_samples=batches.num_images, forward=forward_statistics, layers=is_level_norm
        )

        errors: dict[str, float] = {}
        for estimate in report.reached:
            name = estimate.levels[0] if population == "per_level" else "all levels"
            errors[name] = max(errors.get(name, 0.0), estimate.error)
        for name, error in errors.items():
            needs.append(Need(name, error, report.num_samples * (error / TOLERANCE) ** 2))
    return needs


def time_passes(ours: nn.Module, theirs: Any) -> list[float]:
    """Seconds of fvcore's pass over those of ours, on the same batches that are in memory, pair by pair."""
    batches = list(itertools.islice(load_batches(BATCH_SIZE), NUM_TIMED))
    theirs.train()
    theirs.backbone.eval()

    def run_ours() -> None:
        recompute_population_statistics(ours, batches, forward=forward_statistics, layers=is_level_norm)

    def run_theirs() -> None:
        with EventStorage():
            update_bn_stats(theirs, batches, len(batches))

    ratios = []
    for index in range(-1, NUM_PAIRS):  # the first pair allocates
        seconds = {}
        for arm in (run_ours, run_theirs) if index % 2 == 0 else (run_theirs, run_ours):
            start = time.perf_counter()
            arm()
            seconds[arm] = time.perf_counter() - start
        ratios += [seconds[run_theirs] / seconds[run_ours]] if index >= 0 else []
    return ratios


def run_all(weights: str, file: str | None) -> None:
    """Print the table, and write the figures if a file is named."""
    ensure_digits()
    ours, theirs = make_detectors(weights)

    ratios = time_passes(ours, theirs)
    figures = [reach_tolerance(ours, 2), reach_tolerance(ours, BATCH_SIZE), run_fvcore(theirs)]
    needs = count_needs(ours)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(format_figures(figures))
    print(f"\n{format_needs(needs)}")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"\nA batch of {BATCH_SIZE}, fvcore / ours: {spread}, {len(ratios)} pairs of {NUM_TIMED} batches")
    if file is not None:
        tables = [[asdict(entry) for entry in table] for table in (figures, needs)]
        write_figures(file, [{"figures": tables[0], "needs": tables[1], "ratios": ratios}])


def format_figures(figures: Sequence[Figure]) -> str:
    """The table; the last run is what the others are compared with."""
    rows = []
    for figure in figures:
        error = "not told" if figure.error is None else f"{100 * figure.error:.2f} %"
        half = "" if figure.half is None else f"{figure.half:.0f}"
        ratio = figures[-1].seconds / figure.seconds
        rows.append([figure.name, str(figure.num_images), error, half, f"{figure.seconds:.1f}", f"{ratio:.1f}"])

    headers = ["statistics of the head", "images", "standard error", "half needed", "seconds", "fvcore / this"]
    return format_rows(rows, headers)


def format_needs(needs: Sequence[Need]) -> str:
    """The table of what the images are drawn from."""
    rows = [[need.name, f"{100 * need.error:.2f} %", f"{need.num_images:.0f}"] for need in needs]
    headers = ["if each image counts as new", "standard error after all", f"images for {100 * TOLERANCE:g} %"]
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

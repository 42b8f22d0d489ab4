#!/usr/bin/env python
"""What it costs to know the shared statistics of a RetinaNet head to 1 %, against fvcore's fixed number of batches.

    python bench/population_statistics.py

Row 1 of the paper's Table 5 on the digits set (made on first use), re-estimated until the standard error is below the
tolerance (95 % of the channels), in batches of 2 and of 8; and fvcore's `update_bn_stats` with 500 batches of 8,
as the paper's project and detectron2 use it, on detectron2's own RetinaNet: fvcore refuses a norm that is reused over
levels. Both re-estimate the norms of the head alone, on the same images and weights, loading included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from table5 import load_rows
from tabulate import tabulate
from torch import nn

from bnext import recompute_population_statistics
from bnext.checkpoints.checkpointer import Checkpointer
from bnext.cli.run_command import run_command
from bnext.data.catalog import ensure_digits
from bnext.data.loader import build_train_loader
from bnext.evaluation.reestimate import is_level_norm
from bnext.heads import forward_statistics

CONFIG = Path(__file__).parents[1] / "projects/RethinkingBatchNorm/configs/digits/table5_row1.yaml"
BATCH_SIZE = 8  # of fvcore's batches


def make_detectors(cfg: CfgNode, weights: str) -> tuple[nn.Module, nn.Module]:
    """Row 1; and detectron2's own, with statistics for each level. Their weights are the same."""
    torch.manual_seed(0)
    ours, theirs = (
        build_model(change(cfg, "MODEL.META_ARCHITECTURE", name)) for name in ("BNextRetinaNet", "RetinaNet")
    )
    if weights:
        Checkpointer(ours).load(weights, checkpointables=[], complete=True)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # the statistics of the head have other keys
    return ours, theirs


def change(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """A copy with one value changed."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    return cfg


def load_batches(cfg: CfgNode, batch_size: int) -> Any:
    """The training's images, in its order."""
    return build_train_loader(change(cfg, "SOLVER.IMS_PER_BATCH", batch_size))


def reach_tolerance(
    model: nn.Module, cfg: CfgNode, batch_size: int, tolerance: float, limit: int
) -> tuple[int, str, str]:
    """Images that it took, the standard error that was reached, and images that half of the sets would have taken."""
    report = recompute_population_statistics(
        model,
        load_batches(cfg, batch_size),
        num_samples=limit,
        tolerance=tolerance,
        forward=forward_statistics,
        layers=is_level_norm,
    )
    errors = [estimate.error for estimate in report.reached]
    half = report.num_samples * (statistics.median(errors) / tolerance) ** 2  # errors fall with the root of the number
    return report.num_samples, f"{100 * max(errors):.2f} %", f"{half:.0f}"


def run_fvcore(model: nn.Module, cfg: CfgNode, num_batches: int) -> tuple[int, str, str]:
    """Images, and no error: fvcore knows none."""
    model.train()
    model.backbone.eval()
    with EventStorage():
        update_bn_stats(model, load_batches(cfg, BATCH_SIZE), num_batches)
    return num_batches * BATCH_SIZE, "not told", ""


def time_run(run: Callable[[], tuple[int, str, str]]) -> tuple[int, str, str, float]:
    """What it gives, and seconds."""
    start = time.perf_counter()
    num_images, error, half = run()
    return num_images, error, half, time.perf_counter() - start


def bench(weights: str, tolerance: float, num_batches: int) -> None:
    """Print the table."""
    ensure_digits()
    cfg = load_rows({1: str(CONFIG)}, "output/bench_statistics", ())[1]
    ours, theirs = make_detectors(cfg, weights)
    limit = num_batches * BATCH_SIZE
    runs = {
        f"ours, to {100 * tolerance:g} %, batches of {size}": partial(
            reach_tolerance, ours, cfg, size, tolerance, limit
        )
        for size in (2, BATCH_SIZE)
    }
    runs[f"fvcore, {num_batches} batches of {BATCH_SIZE}"] = partial(run_fvcore, theirs, cfg, num_batches)
    found = {}
    for name, run in runs.items():
        found[name] = time_run(run)
        print(f"{name}: {found[name][0]} images, {found[name][-1]:.1f} s", flush=True)
    seconds = list(found.values())[-1][-1]
    table = [[name, *row[:-1], f"{row[-1]:.1f}", f"{seconds / row[-1]:.1f}"] for name, row in found.items()]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    headers = [
        "statistics of the head",
        "images",
        "standard error",
        "half of the sets need",
        "seconds",
        "fvcore / this",
    ]
    print(tabulate(table, headers=headers))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="", help="a checkpoint of row 1 (default: weights of the beginning)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of our runs (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=500, help="of fvcore, and our limit (default: %(default)s)")
    args = parser.parse_args(argv)
    return run_command(lambda: bench(args.weights, args.tolerance, args.batches))


if __name__ == "__main__":
    sys.exit(main())

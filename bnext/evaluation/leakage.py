"""Leakage: whether an R-CNN head has learned that the RoIs of its mini-batches were of one image.

One trained model, evaluated three times: with mini-batches that are the RoIs of one image, as in its training with an
image per worker; with mini-batches of the same sizes, but of RoIs dealt out at random from several images; and with
population statistics. A head that leaks is good at the first alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from bnext.checkpoints.checkpointer import load_model
from bnext.distributed import unwrap_model
from bnext.errors import ConfigError
from bnext.evaluation.coco import build_evaluator, evaluate_with
from bnext.evaluation.rehearsal import rehearse
from bnext.figures import PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.files import write_json
from bnext.heads import mixing_images
from bnext.heads.roi import find_roi_heads
from bnext.layers import BatchNorm2d
from bnext.layers.walk import find_bnext_norms
from bnext.scope.statistics import answering
from bnext.seeding import seeded
from bnext.tables import format_rows
from bnext.text import escape_math

__all__ = ["WAYS", "draw_leakage", "evaluate_leakage", "format_leakage", "show_leakage", "use_inference"]

# Way -> in words.
WAYS = {
    "one_image": "mini-batch: RoIs of one image",
    "mixed": "mini-batch: RoIs mixed between images",
    "population": "population statistics",
}


@contextlib.contextmanager
def use_inference(model: nn.Module, inference: str) -> Iterator[None]:
    """In this scope, the norms of a detector's RoI heads take these statistics at inference.

    Args:
        model: an R-CNN with norms of bnext in its heads.
        inference: "population" or "mini_batch".

    Raises:
        ConfigError: its heads have no such norm, or keep no population statistics.
    """
    norms: list[BatchNorm2d] = []
    for _, head in find_roi_heads(unwrap_model(model)):
        norms += find_bnext_norms(head).values()

    if not norms:
        rule = "have batch norms of bnext in its RoI heads"
        remedy = "Take a model of BNextGeneralizedRCNN with MODEL.ROI_BOX_HEAD.NORM or MODEL.ROI_MASK_HEAD.NORM BN."
        raise ConfigError.of("model", rule, got="none", where=type(model).__name__, remedy=remedy)

    with answering(norms, inference=inference):
        yield


def evaluate_leakage(cfg: CfgNode, model: nn.Module, images_per_batch: int = 8) -> dict[str, dict[str, Any]]:
    """The three evaluations on the first data set of cfg.DATASETS.TEST.

    Args:
        cfg: see `evaluate_model`.
        model: an R-CNN with batch norms of bnext in its heads; as it was afterwards.
        images_per_batch: that a worker evaluates together, whose RoIs are mixed; 2 or more.

    Returns:
        Way -> the metrics of COCO ({"bbox": {"AP": ...}, "segm": ...}) on the main process; see `WAYS`.

    Raises:
        ConfigError: a single image per batch cannot be mixed, or the heads have no such norm.

    Note:
        A collective. The dealing of the RoIs is the same in every run.
    """
    if images_per_batch < 2:
        rule = "be 2 or more, so that RoIs can be mixed"
        raise ConfigError.of("images_per_batch", rule, got=images_per_batch, where="evaluate_leakage", remedy="Use 8.")

    rehearse(cfg, build=build_evaluator)

    name, results = cfg.DATASETS.TEST[0], {}
    for way in WAYS:
        inference = "population" if way == "population" else "mini_batch"
        mixing = mixing_images(model) if way == "mixed" else contextlib.nullcontext()
        evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", way))
        with use_inference(model, inference), mixing, seeded(comm.get_rank()):
            results[way] = evaluate_with(cfg, model, name, evaluator, images_per_batch)
    return results


def format_leakage(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of box and mask AP, and what is lost against the RoIs of one image."""
    names = {"bbox": "box AP", "segm": "mask AP"}
    tasks = [task for task in names if task in results["one_image"]]

    headers = ["statistics at test"]
    for task in tasks:
        headers += [names[task], "change"]

    rows = []
    for way, metrics in results.items():
        row = [WAYS[way]]
        for task in tasks:
            value = metrics[task]["AP"]
            change = "" if way == "one_image" else f"{value - results['one_image'][task]['AP']:+.1f}"
            row += [f"{value:.1f}", change]
        rows.append(row)
    return format_rows(rows, headers)


def draw_leakage(results: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Bars of box AP for each way of evaluation, one group for each trained model.

    Args:
        results: title of a model -> what `evaluate_leakage` gave for it.
        path: of the PNG; written whole.
    """
    figure = make_figure(max(520, 160 + 240 * len(results)), 380)
    axes = figure.add_subplot()

    width = 0.8 / len(WAYS)
    for index, way in enumerate(WAYS):
        places = [model + (index - (len(WAYS) - 1) / 2) * width for model in range(len(results))]
        aps = [ways[way]["bbox"]["AP"] for ways in results.values()]
        bars = axes.bar(places, aps, width, label=WAYS[way], color=PLAIN[index % len(PLAIN)])
        axes.bar_label(bars, fmt="%.1f", fontsize=to_points(13))

    axes.set_xticks(range(len(results)), [escape_math(title) for title in results])
    axes.set_ylabel("box AP")
    axes.margins(y=0.12)
    style_axes(axes)
    figure.legend(loc="outside upper center", fontsize=to_points(13), frameon=False)
    return save_figure(figure, path)


def show_leakage(models: Mapping[str, tuple[CfgNode, str]], output: str, images_per_batch: int = 8) -> None:
    """Evaluate trained models in the three ways; print a table of each, write leakage.json and leakage.png.

    Args:
        models: title -> config and file of weights.
        output: folder for both files.
        images_per_batch: see `evaluate_leakage`.

    Raises:
        BNextError: a config, its data or a checkpoint does not fit.
    """
    results = {}
    for title, (cfg, weights) in models.items():
        results[title] = evaluate_leakage(cfg, load_model(cfg, weights), images_per_batch)
        print(f"\n{title}\n{format_leakage(results[title])}", flush=True)

    path = Path(output, "leakage.json")
    write_json(path, results)
    print(f"\n{path}\n{draw_leakage(results, Path(output, 'leakage.png'))}")

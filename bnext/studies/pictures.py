"""Detections of several models on the same images, side by side in one PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from torch import nn

from bnext.data.mapping import build_mapper
from bnext.data.read_image import read_image
from bnext.files import replace_file
from bnext.scope.model import restoring
from bnext.text import escape_math

__all__ = ["draw_detections"]

_NUM_IMAGES = 4  # columns
_SCORE_THRESHOLD = 0.3  # detections below it are left out
_SCALE = 4.0  # enlargement of the images


def draw_detections(cfg: CfgNode, models: Mapping[str, nn.Module], path: str | os.PathLike[str]) -> Path:
    """Draw boxes, classes and scores of several models, one row of pictures each, under the true boxes.

    Args:
        cfg: its first test set gives the images, which are taken evenly from all of them.
        models: title -> detector.
        path: of the PNG; written whole.
    """
    name = cfg.DATASETS.TEST[0]
    records = DatasetCatalog.get(name)
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, _NUM_IMAGES).round().astype(int)]

    rows = {"ground truth": [_draw_truth(record, name) for record in chosen]}
    for title, model in models.items():
        pictures = []
        for record in chosen:
            instances = _detect(cfg, model, record)
            visualizer = _start_drawing(record, name)
            shown = instances[instances.scores > _SCORE_THRESHOLD]
            pictures.append(visualizer.draw_instance_predictions(shown).get_image())
        rows[f"{title}\n(score > {_SCORE_THRESHOLD:g})"] = pictures

    return _save_grid(rows, Path(path))


def _start_drawing(record: dict[str, Any], dataset: str) -> Visualizer:
    """A picture to draw on, with the names of classes as they are spelled: detectron2's text is matplotlib's."""
    image = read_image(record["file_name"], "RGB", (record.get("width"), record.get("height")))
    known = MetadataCatalog.get(dataset).as_dict()
    known["thing_classes"] = [escape_math(name) for name in known.get("thing_classes", [])]
    return Visualizer(image, Metadata(**known), scale=_SCALE)


def _draw_truth(record: dict[str, Any], dataset: str) -> np.ndarray:
    boxes = []
    for annotation in record["annotations"]:
        boxes.append({key: value for key, value in annotation.items() if key != "segmentation"})
    visualizer = _start_drawing(record, dataset)
    return visualizer.draw_dataset_dict({**record, "annotations": boxes}).get_image()


@torch.no_grad()
def _detect(cfg: CfgNode, model: nn.Module, record: dict[str, Any]) -> Instances:
    image = build_mapper(cfg, False)(record)
    with restoring(model):
        return model.eval()([image])[0]["instances"].to("cpu")


def _save_grid(rows: Mapping[str, Sequence[np.ndarray]], path: Path) -> Path:
    num_columns = len(next(iter(rows.values())))
    # Not pyplot, which may want a display.
    figure = Figure(figsize=(3.2 * num_columns, 3.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), num_columns, squeeze=False)

    for (title, images), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(escape_math(title), fontsize=13)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
    return path

"""AP of a detector on test images that are attacked before it sees them, with its own gradients and their labels."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from bnext.data.classes import relabel_records
from bnext.data.mapping import build_mapper
from bnext.data.records import Record, load_records
from bnext.errors import DatasetError, Refusal
from bnext.evaluation.adversarial import AttackedLoss, make_adversarial
from bnext.evaluation.coco import evaluate_model

__all__ = ["UnderAttack", "evaluate_under_attack"]

_NO_LABELS = Refusal(
    DatasetError,
    "An image to attack",
    "be of a labelled set of DATASETS.TEST",
    "Evaluate with the config that names its set.",
)


class UnderAttack(nn.Module):
    """A detector that gets adversarial copies in the place of the images, normalized as at inference in the attack.

    Args:
        model: the detector.
        label: a record -> the same image with labels, both as the model gets them.
        options: of `make_adversarial`.
    """

    def __init__(self, model: nn.Module, label: Callable[[Record], Record], **options: Any) -> None:
        super().__init__()
        self.model = model
        self._label = label
        self._options = options

    def forward(self, batch: list[Record]) -> Any:
        labelled = [self._label(record) for record in batch]
        copies = make_adversarial(self.model, labelled, statistics="population", **self._options)
        pairs = zip(batch, copies, strict=True)
        return self.model([{**record, "image": copy["image"]} for record, copy in pairs])


def evaluate_under_attack(
    cfg: CfgNode,
    model: nn.Module,
    output_folder: str | None = None,
    *,
    epsilon: float = 4.0,
    steps: int = 1,
    step_size: float | None = None,
    loss: AttackedLoss = "total",
) -> OrderedDict[str, Any]:
    """COCO AP on adversarial copies of every data set of cfg.DATASETS.TEST: how robust a detector is.

    Args:
        cfg, model: see `evaluate_model`.
        output_folder: None: OUTPUT_DIR/inference_under_attack.
        epsilon, steps, step_size, loss: see `make_adversarial`.

    Returns:
        As `evaluate_model`.

    Raises:
        ConfigError: an argument that cannot be.
        DatasetError: a set has images without labels.

    Note:
        The attack knows weights, statistics and labels. The model is left as it is.
    """
    records = {}
    for name in cfg.DATASETS.TEST:
        for record in relabel_records(cfg, name, load_records(name, cfg)):
            records[_identify(record)] = record
    mapper = build_mapper(cfg, True, as_test=True)

    def label(record: Record) -> Record:
        labelled = records.get(_identify(record))
        mapped = None if labelled is None or "annotations" not in labelled else mapper(labelled)
        if mapped is None:
            raise _NO_LABELS.of("one without annotations", str(record.get("file_name", "")))
        return mapped

    attacked = UnderAttack(model, label, epsilon=epsilon, steps=steps, step_size=step_size, loss=loss)
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference_under_attack")
    return evaluate_model(cfg, attacked, folder)


def _identify(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("dataset_source", "file_name", "image_id"))

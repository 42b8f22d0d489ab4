"""Pictures for people: whatever somebody has named a data set or a class, it is drawn letter by letter."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from bnext.evaluation.compare_report import draw_comparison
from bnext.evaluation.leakage import WAYS, draw_leakage
from bnext.studies.pictures import draw_detections

NAME = r"price_$^{"  # no formula


class OneBox(nn.Module):
    def forward(self, images):
        found = Instances((32, 32), pred_boxes=Boxes(torch.tensor([[4.0, 4.0, 20.0, 20.0]])))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        return [{"instances": found}]


@pytest.fixture
def dataset(tmp_path):
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "a.png")
    box = {"bbox": [4, 4, 16, 16], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "height": 32, "width": 32, "image_id": 1, "annotations": [box]}
    DatasetCatalog.register(NAME, lambda: [record])
    MetadataCatalog.get(NAME).thing_classes = [r"$\frac{a}$ 10 %"]
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_names_of_classes_sets_and_models_are_no_formulas(dataset, tmp_path):
    cfg = get_cfg()
    cfg.DATASETS.TEST = (dataset,)
    path = draw_detections(cfg, {r"$\model$": OneBox()}, tmp_path / "out.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert MetadataCatalog.get(dataset).thing_classes == [r"$\frac{a}$ 10 %"], "the user's own are left alone"


def test_titles_of_bars_are_no_formulas(tmp_path):
    reading = {"not_applicable": "no labels"}
    comparison = {"rows": {"moving_average": {"bbox/AP": 1.0}}, "dataset": NAME, "reading": reading}
    assert draw_comparison(comparison, tmp_path / "comparison.png").exists()

    results = {r"$\model$": {way: {"bbox": {"AP": 1.0}} for way in WAYS}}
    assert draw_leakage(results, tmp_path / "bars.png").exists()

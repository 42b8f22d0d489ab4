"""Pictures for people: boxes in the colours of what they are, labels apart, names letter by letter."""

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from bnext.config import add_bnext_config
from bnext.data.records import load_records
from bnext.errors import ConfigError
from bnext.evaluation.compare_report import draw_comparison
from bnext.evaluation.detections import choose_images, examine
from bnext.evaluation.leakage import WAYS, draw_leakage
from bnext.figures import COLORS
from bnext.studies.bars import draw_bars
from bnext.studies.pictures import Layout, _find_place, _overlap, draw_detections

NAME = r"price_$^{"  # no formula
SIDE = 32


class Boxed(nn.Module):
    """Detects the same boxes in each image."""

    def __init__(self, *boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, images):
        found = Instances(
            (SIDE, SIDE), pred_boxes=Boxes(torch.tensor([box for box, _, _ in self.boxes]).reshape(-1, 4))
        )
        found.scores = torch.tensor([score for _, _, score in self.boxes])
        found.pred_classes = torch.tensor([label for _, label, _ in self.boxes], dtype=torch.int64)
        return [{"instances": found} for _ in images]


RIGHT = ([4.0, 4.0, 20.0, 20.0], 0, 0.9)
WRONG_CLASS = ([4.0, 4.0, 20.0, 20.0], 1, 0.8)
FAR = ([24.0, 24.0, 31.0, 31.0], 0, 0.7)


@pytest.fixture
def dataset(tmp_path):
    """Two images with an object each."""
    box = {"bbox": [4, 4, 16, 16], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = []
    for number in (1, 2):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(path)
        records.append({"file_name": str(path), "height": SIDE, "width": SIDE, "image_id": number})
        records[-1]["annotations"] = [box]

    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=[r"$\frac{a}$ 10 %", "b"], evaluator_type="coco")
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS = (), (NAME,), 0
    cfg.INPUT.MIN_SIZE_TEST = SIDE
    yield cfg
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def read_pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def count_color(path, color):
    pixels = read_pixels(path)
    wanted = [int(COLORS[color][place : place + 2], 16) for place in (1, 3, 5)]
    return int((pixels == wanted).all(axis=2).sum())


def test_boxes_have_the_colours_of_what_they_are(dataset, tmp_path):
    records = load_records(NAME, dataset)
    counts = {}
    for title, model in {"all": Boxed(RIGHT, WRONG_CLASS, FAR), "none": Boxed(), r"$\model$": Boxed(RIGHT)}.items():
        column = examine(dataset, model, title=title)
        path = draw_detections([column], records, tmp_path / "new" / f"{len(counts)}.png")
        counts[title] = {color: count_color(path, color) for color in ("green", "orange", "vermillion", "black")}

    for color, drawn in {"green": "all", "orange": "all", "vermillion": "all", "black": "none"}.items():
        other = "none" if drawn == "all" else "all"
        assert counts[drawn][color] > 2 * counts[other][color] + 50, f"{color}, beside the legend"
    assert MetadataCatalog.get(NAME).thing_classes[0] == r"$\frac{a}$ 10 %", "the user's own are left alone"


def test_the_size_of_a_picture_is_that_of_its_cells(dataset, tmp_path):
    column = examine(dataset, Boxed(RIGHT), title="a")
    records, sizes = load_records(NAME, dataset), []
    for page in (1000, 300):
        path = draw_detections([column, column], records, tmp_path / f"{page}.png", layout=Layout(200, page))
        sizes.append(read_pixels(path).shape[:2])
    (low, wide), (high, narrow) = sizes
    assert wide == 4 * 200 + 2 * 8 + 26 + 2 * 14, "two images beside each other"
    assert narrow == 480
    assert high > low + 200, "one below the other"


def test_labels_lie_apart_where_there_is_room():
    placed, boxes = [], [(40.0, 40.0, 80.0, 80.0)] * 4
    for box in boxes:
        x, y = _find_place(box, (50, 16), (200, 200), placed, boxes)
        placed.append((x, y, x + 50, y + 16))
    assert all(_overlap(one, other) == 0 for one, other in itertools.combinations(placed, 2))
    assert all(x >= 0 and y >= 0 and right <= 200 and bottom <= 200 for x, y, right, bottom in placed)


def test_nothing_of_matplotlib_is_changed(dataset, tmp_path):
    before = dict(matplotlib.rcParams)
    column = examine(dataset, Boxed(RIGHT, FAR), title="a")
    draw_detections([column], load_records(NAME, dataset), tmp_path / "a.png", layout=Layout(crop=True))
    draw_bars([column], tmp_path / "bars.png", note=NAME)
    assert dict(matplotlib.rcParams) == before


def test_the_whole_set_is_evaluated_and_counted(dataset):
    column = examine(dataset, Boxed(RIGHT, WRONG_CLASS, FAR))
    expected = {"right": 2, "wrong_class": 2, "background": 2, "duplicate": 0, "badly_placed": 0, "missed": 0}
    assert column.count() == expected
    assert column.metrics["bbox/AP"] == pytest.approx(100)
    assert column.metrics["bbox/APs"] == pytest.approx(100)
    assert column.metrics["bbox/APl"] is None

    (first, _) = load_records(NAME, dataset)
    part = examine(dataset, Boxed(RIGHT, WRONG_CLASS, FAR), [first], score=0.75)
    assert part.metrics == {}
    assert list(part.matches) == [1]
    assert part.matches[1].outcomes == ("right", "wrong_class")


def test_images_without_annotations_are_drawn_and_not_judged(dataset, tmp_path):
    records = [{k: v for k, v in record.items() if k != "annotations"} for record in load_records(NAME, dataset)]
    DatasetCatalog.register("bare", lambda: records)
    try:
        dataset.DATASETS.TEST = ("bare",)
        column = examine(dataset, Boxed(RIGHT), title="a")
    finally:
        DatasetCatalog.remove("bare")
    assert column.names == ("class 0",)
    assert not column.matches
    path = draw_detections([column], records, tmp_path / "a.png")
    assert count_color(path, "blue") > 500
    assert not count_color(path, "green")


def test_images_are_chosen(dataset):
    records = load_records(NAME, dataset)
    good, bad = examine(dataset, Boxed(RIGHT)), examine(dataset, Boxed(FAR))
    bad.detected[1], bad.matches[1] = good.detected[1], good.matches[1]
    for columns in ([good, bad], [bad]):
        assert choose_images(records, 1, columns=columns) == records[1:]
    assert choose_images(records, 1) == records[:1]
    assert choose_images(records, 5, seed=0) == records
    assert choose_images(records, 1, names=["2.png", "1"]) == records[::-1]
    with pytest.raises(ConfigError, match=r"'3\.png'"):
        choose_images(records, 1, names=["3.png"])


def test_titles_of_bars_are_no_formulas(dataset, tmp_path):
    reading = {"not_applicable": "no labels"}
    comparison = {"rows": {"moving_average": {"bbox/AP": 1.0}}, "dataset": NAME, "reading": reading}
    assert draw_comparison(comparison, tmp_path / "comparison.png").exists()

    results = {r"$\model$": {way: {"bbox": {"AP": 1.0}} for way in WAYS}}
    assert draw_leakage(results, tmp_path / "bars.png").exists()

    columns = [examine(dataset, model, title=r"$\model$") for model in (Boxed(RIGHT), Boxed())]
    assert draw_bars(columns, tmp_path / "two.png", note=NAME).exists()

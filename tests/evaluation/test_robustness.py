"""AP by corruption: every evaluation sees its corrupted pictures; P, mPC and rPC are as they are defined."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from bnext.data.corruptions.names import COMMON, SEVERITIES
from bnext.data.listed_sets import KEY, register_sets
from bnext.evaluation.robustness import is_as_published, measure_robustness, summarize
from bnext.evaluation.robustness_report import describe_summary, draw_robustness, format_robustness
from tests import tiny
from tests.evaluation.own_sets import SIDE, detect, make_set
from tests.markdown import read_tables


class DarkEye(nn.Module):
    """Sees all objects of a dark picture, and nothing in a bright one; remembers how bright pictures were."""

    def __init__(self, content):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.content, self.seen = content, []

    def forward(self, batch):
        outputs = []
        for record in batch:
            brightness = record["image"].float().mean().item()
            self.seen.append((record.get("domain"), brightness))
            nothing = Instances((SIDE, SIDE), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
            nothing.pred_classes = torch.zeros(0, dtype=torch.int64)
            is_dark = brightness < 128
            outputs.append(detect(self.content, record["image_id"]) if is_dark else {"instances": nothing})
        return outputs


@pytest.fixture
def content(tmp_path):
    content = make_set()
    (tmp_path / "val.json").write_text(json.dumps(content))
    for image in content["images"]:
        pixels = np.random.default_rng(image["id"]).integers(30, 90, (SIDE, SIDE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    yield content

    register_sets([])
    for name in [name for name in DatasetCatalog if "@" in name]:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def load(folder, *opts):
    entry = {"name": "mine", "json": str(folder / "val.json"), "folder": str(folder)}
    sets = ("DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ("mine",), "DATASETS.DOMAINS.TEST", ("day",))
    return tiny.load(folder / "output", KEY, [entry], *sets, "MODEL.RETINANET.NUM_CLASSES", 3, *opts)


def test_each_evaluation_sees_its_own_pictures(content, tmp_path):
    model, told = DarkEye(content).eval(), []
    corruptions, severities = ("invert", "low_contrast"), (1, 5)
    results = measure_robustness(
        load(tmp_path), model, corruptions, severities, on_result=lambda each: told.append(json.dumps(each))
    )

    assert results["clean"]["bbox/AP"] == pytest.approx(100)
    aps = {name: [row["bbox/AP"] for row in rows.values()] for name, rows in results["corrupted"].items()}
    assert aps == {"invert": pytest.approx([100, 0]), "low_contrast": pytest.approx([100, 100])}
    assert not [key for key in results["clean"] if "/AP-" in key]
    assert len(set(told)) == 5
    assert {domain for domain, _ in model.seen} == {"day"}
    brightness = np.array([value for _, value in model.seen]).reshape(5, 4).mean(axis=1)
    assert brightness[2] == pytest.approx(255 - brightness[0], abs=0.01)
    assert brightness[4] == pytest.approx(127.5 + 0.15 * (brightness[0] - 127.5), abs=1)

    summary = summarize(results, corruptions, severities)
    assert (summary["P"], summary["mPC"], summary["rPC"]) == pytest.approx((100, 75, 0.75))


def test_what_is_measured_is_not_measured_again(content, tmp_path):
    model = DarkEye(content).eval()
    first = measure_robustness(load(tmp_path), model, ["invert"], [5])
    model.seen.clear()
    both = measure_robustness(load(tmp_path), model, ["invert", "fog"], [5], measured=json.loads(json.dumps(first)))
    assert len(model.seen) == 4
    assert list(both["corrupted"]) == ["invert", "fog"]
    assert both["clean"] == first["clean"]


def make_results(seed=0):
    """Random APs of all that COCO-C has."""
    aps = np.random.default_rng(seed).uniform(0, 40, (len(COMMON), len(SEVERITIES)))
    corrupted = {}
    for name, row in zip(COMMON, aps.tolist(), strict=True):
        corrupted[name] = {str(severity): {"bbox/AP": ap} for severity, ap in zip(SEVERITIES, row, strict=True)}
    return {"clean": {"bbox/AP": 42.0}, "corrupted": corrupted}, aps


def test_the_means_are_those_of_the_paper():
    results, aps = make_results()
    summary = summarize(results, COMMON, SEVERITIES)
    assert summary["mPC"] == pytest.approx(aps.mean(axis=1).mean())
    assert summary["rPC"] == pytest.approx(aps.mean() / 42)
    assert is_as_published(COMMON, SEVERITIES)
    assert not is_as_published((*COMMON, "invert"), SEVERITIES)
    assert not is_as_published(COMMON, (1, 3, 5))

    subset = summarize(results, ["fog", "snow"], [5, 1])
    rows = [COMMON.index("fog"), COMMON.index("snow")]
    assert subset["mPC"] == pytest.approx(aps[rows][:, [0, 4]].mean())
    results["clean"]["bbox/AP"] = 0.0
    assert summarize(results, COMMON, SEVERITIES)["rPC"] is None


def test_a_table_and_a_picture(tmp_path):
    results, aps = make_results()
    text = format_robustness(results, COMMON, SEVERITIES)
    (table,) = read_tables(text)
    assert len(table) == 2 + len(COMMON)  # the headers, and the clean set
    assert f"mPC {aps.mean():.1f}" in text
    assert "papers" not in text
    assert "papers" in describe_summary(results, COMMON, [1])

    picture = draw_robustness(results, COMMON, SEVERITIES, tmp_path / "a.png", note="a $ set")
    with Image.open(picture) as image:
        assert min(image.size) > 500

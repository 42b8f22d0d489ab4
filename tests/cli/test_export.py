"""A file that runs without bnext is written when it was seen to compute what the detector does, and else refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from detectron2.structures import Boxes, Instances

from bnext.checkpoints import load_model
from bnext.cli import export
from bnext.cli.export import ENDINGS, ExportRequest, export_checkpoint, fold_parts
from bnext.errors import CheckpointError, ConfigError, StatisticsError
from bnext.layers.folded_norm import FoldedNorm
from bnext.layers.walk import find_bnext_norms
from tests import saved, tiny

SLOW = pytest.mark.slow
# The traces of the tests' own Detectron2 warn of scripted functions; outputs are compared.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FOUND = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)


def load(weights, *opts):
    return tiny.load(weights.parent / "unused", "MODEL.WEIGHTS", weights, *FOUND, *opts)


def run_file(file, picture):
    """The outputs of an exported file, by another program's means alone."""
    if file.suffix == ".ts":
        return [output.detach() for output in torch.jit.load(file)(picture)]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"image": picture.numpy()})]


@pytest.mark.parametrize("ending", [".ts", pytest.param(".onnx", marks=SLOW)])
def test_a_detector_of_folded_and_of_level_norms(weights, tmp_path, ending):
    """Row 5 of Table 5: norms of the backbone go into their convolutions, those of the head serve all levels."""
    file = tmp_path / f"model{ending}"
    report = export_checkpoint(load(weights), ExportRequest(str(file), fold=True, num_images=2))
    assert report["compared"] == {"images": 2, "of": "digits_val", "detections": report["compared"]["detections"]}
    assert report["compared"]["detections"] > 0
    assert report["norms_left"] == ["head.bbox_subnet.1", "head.cls_subnet.1"]
    assert report["folded"] == 21

    picture = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1)) * 255
    outputs = dict(zip(report["outputs"], run_file(file, picture), strict=True))
    with torch.no_grad():
        (expected,) = load_model(load(weights), str(weights))([{"image": picture}])
    expected = expected["instances"]
    torch.testing.assert_close(outputs["scores"], expected.scores, rtol=0, atol=1e-3)
    torch.testing.assert_close(outputs["pred_boxes"], expected.pred_boxes.tensor, rtol=0, atol=0.1)
    assert json.loads(Path(f"{file}.json").read_text())["outputs"] == report["outputs"]


@SLOW
def test_a_file_that_computes_something_else_is_not_written(weights, tmp_path, monkeypatch):
    def trace_wrongly(adapter, picture, example):
        exported = trace(adapter, picture, example)
        return dataclasses.replace(exported, run=lambda picture: [output[:-1] for output in exported.run(picture)])

    trace = export._trace
    monkeypatch.setattr(export, "_trace", trace_wrongly)
    with pytest.raises(StatisticsError, match=r"got \d+ detections instead of"):
        export_checkpoint(load(weights), ExportRequest(str(tmp_path / "model.ts"), num_images=1))
    assert not list(tmp_path.iterdir())


@SLOW
def test_the_network_of_a_one_stage_detector(weights, tmp_path):
    report = export_checkpoint(load(weights), ExportRequest(str(tmp_path / "model.pt2"), num_images=2))
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert len(program(torch.zeros(report["compared"]["batch"]))) == len(report["outputs"]) == 10


@SLOW
def test_a_two_stage_detector(digits, tmp_path):
    weights = saved.save(tmp_path / "rcnn.pth", tiny.RCNN)
    cfg = tiny.load(tmp_path, "MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, config=tiny.RCNN)
    report = export_checkpoint(cfg, ExportRequest(str(tmp_path / "model.onnx"), num_images=2))
    assert {"pred_boxes", "pred_classes", "scores", "image_size"} <= set(report["outputs"])
    with pytest.raises(ConfigError, match=r"one-stage detector for a \.pt2"):
        export_checkpoint(cfg, ExportRequest(str(tmp_path / "model.pt2")))
    assert not (tmp_path / "model.pt2").exists()


def test_without_a_data_set_there_is_noise(weights, tmp_path):
    cfg = load(weights, "DATASETS.TEST", "('absent',)")
    pictures, source = export.choose_pictures(cfg, 4)
    assert source == "noise"
    assert [tuple(picture.shape) for picture in pictures[:2]] == [(3, 96, 64), (3, 64, 128)]


def test_folding_by_parts_keeps_outputs(weights):
    cfg = load(weights)
    model, before = (load_model(cfg, str(weights)) for _ in range(2))
    assert set(fold_parts(model).left) == {path for path in find_bnext_norms(before) if path.startswith("head.")}
    assert sum(isinstance(module, FoldedNorm) for module in model.modules()) == 21
    picture = [{"image": torch.rand(3, 64, 64) * 255}]
    with torch.no_grad():
        (after,), (expected,) = model(picture), before(picture)
    torch.testing.assert_close(after["instances"].scores, expected["instances"].scores, rtol=0, atol=1e-4)


def make_detections(scores, classes=(0, 0, 1), shift=0.0):
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 40], [5, 5, 30, 30]])[: len(scores)] + shift
    fields = {"pred_boxes": Boxes(boxes), "scores": torch.tensor(scores), "pred_classes": torch.tensor(classes)}
    return Instances((64, 64), **{key: value[: len(scores)] for key, value in fields.items()})


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (make_detections([0.9, 0.5]), "2 detections instead of 3"),
        (make_detections([0.9, 0.5, 0.2], shift=0.5), "2 of 3"),  # the last may be one of several with its score
        (make_detections([0.9, 0.6, 0.2]), "1 of 3"),
        (make_detections([0.9, 0.5, 0.2], classes=(1, 0, 1)), "1 of 3"),
    ],
)
def test_other_detections_are_refused(other, fault):
    expected = make_detections([0.9, 0.5, 0.2])
    outputs = {name: getattr(value, "tensor", value) for name, value in other.get_fields().items()}
    with pytest.raises(StatisticsError, match=f"compute what the model does; got .*{fault}"):
        export.compare_detections(outputs, expected)


def test_the_order_of_equal_detections_may_differ():
    expected = make_detections([0.9, 0.9, 0.2])
    fields = {name: getattr(value, "tensor", value)[[1, 0, 2]] for name, value in expected.get_fields().items()}
    export.compare_detections(fields, expected)


def test_what_is_refused_writes_nothing(weights, tmp_path):
    cfg = load(weights)
    file = tmp_path / "model.ts"
    for request, thing in (
        (ExportRequest(str(tmp_path / "model.trt")), "end in .ts or .onnx or .pt2"),
        (ExportRequest(str(tmp_path / "no" / "model.ts")), "folder that exists"),
        (ExportRequest(str(file), domain="night"), "domain"),
        (ExportRequest(str(file), num_images=0), "--num-images"),
    ):
        with pytest.raises(ConfigError, match=thing):
            export_checkpoint(cfg, request)
    with pytest.raises(CheckpointError, match="absent"):
        export_checkpoint(load(weights.with_name("absent.pth")), ExportRequest(str(file)))

    file.write_text("mine")
    with pytest.raises(ConfigError, match="not exist"):
        export_checkpoint(cfg, ExportRequest(str(file)))
    assert file.read_text() == "mine"


def test_each_ending_has_a_format():
    assert tuple(export._FORMATS) == ENDINGS

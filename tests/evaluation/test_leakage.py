"""One checkpoint, three evaluations: RoIs of one image, RoIs mixed between images, population statistics."""

import contextlib
import importlib.util
import json

import pytest
import torch
from detectron2.data import DatasetCatalog

from bnext import ConfigError
from bnext.engine.trainer import Trainer
from bnext.evaluation import evaluate_model
from bnext.evaluation.coco import build_evaluator, evaluate_with
from bnext.evaluation.leakage import WAYS, evaluate_leakage, format_leakage, use_inference
from bnext.layers import BatchNorm2d
from tests import tiny
from tests.markdown import read_tables

# Of detectron2's mapper, for masks that pycocotools has decoded.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
SCRIPT = tiny.ROOT / "projects" / "RethinkingBatchNorm" / "show_leakage.py"
EVERYTHING = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)


def load(output, *opts):
    return tiny.load(output, *EVERYTHING, *opts, config=tiny.RCNN)


@pytest.fixture(scope="module")
def model(digits, tmp_path_factory):
    """Population statistics are those of a trained head: not of its mini-batches, and not 0 and 1."""
    torch.manual_seed(0)
    model = Trainer.build_model(load(tmp_path_factory.mktemp("model"))).eval()
    for part in model.roi_heads.modules():
        if isinstance(part, BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
    return model


def specs(model):
    return [part.spec for part in model.modules() if isinstance(part, BatchNorm2d)]


def read_scores(folder):
    return [detection["score"] for detection in json.loads((folder / "coco_instances_results.json").read_text())]


def test_the_three_ways_are_three_evaluations_of_one_model(model, tmp_path):
    before, state = specs(model), {key: value.clone() for key, value in model.state_dict().items()}
    results = evaluate_leakage(load(tmp_path), model, images_per_batch=2)
    assert list(results) == list(WAYS)
    assert specs(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    scores = {way: read_scores(tmp_path / "inference" / way) for way in WAYS}
    assert len({tuple(values) for values in scores.values()}) == 3
    for way, inference in (("one_image", "mini_batch"), ("population", "population")):  # as one by one
        with use_inference(model, inference):
            alone = evaluate_model(load(tmp_path), model, str(tmp_path / "alone"))
        assert read_scores(tmp_path / "alone") == pytest.approx(scores[way], abs=1e-4)
        assert results[way]["bbox"]["AP"] == pytest.approx(alone["bbox"]["AP"], abs=1e-3, nan_ok=True)
    again = evaluate_leakage(load(tmp_path), model, images_per_batch=2)
    assert again["mixed"]["bbox"]["AP"] == pytest.approx(results["mixed"]["bbox"]["AP"], nan_ok=True)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_images_are_evaluated_once_however_many_together(model, tmp_path, size):
    cfg = load(tmp_path)
    evaluator = build_evaluator(cfg, "digits_val", str(tmp_path))
    seen, process = [], evaluator.process
    evaluator.process = lambda inputs, outputs: (seen.append(len(inputs)), process(inputs, outputs))[1]
    evaluate_with(cfg, model, "digits_val", evaluator, images_per_batch=size)
    assert seen == {1: [1, 1, 1, 1], 3: [2, 2], 9: [4]}[size]
    assert len(DatasetCatalog.get("digits_val")) == 4


def test_the_spec_is_put_back_after_an_exception(model):
    before, inside = specs(model), []
    with contextlib.suppress(KeyboardInterrupt), use_inference(model, "mini_batch"):
        inside += specs(model)
        raise KeyboardInterrupt
    assert "mini_batch" in {spec.inference for spec in inside}
    assert specs(model) == before


def test_the_table_says_what_is_lost():
    results = {way: {"bbox": {"AP": ap}, "segm": {"AP": ap - 1}} for way, ap in zip(WAYS, (30, 28.5, 9), strict=True)}
    (rows,) = read_tables(format_leakage(results))
    assert rows[0] == ["statistics at test", "box AP", "change", "mask AP", "change"]
    assert rows[-1][1:] == ["9.0", "-21.0", "8.0", "-21.0"]


def test_a_single_image_cannot_be_mixed(model, tmp_path):
    with pytest.raises(ConfigError, match="images_per_batch"):
        evaluate_leakage(load(tmp_path), model, images_per_batch=1)


def test_heads_without_batch_norm_cannot_leak(digits, tmp_path):
    cfg = load(tmp_path, "MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NORM", "")
    with pytest.raises(ConfigError, match="RoI heads"):
        evaluate_leakage(cfg, Trainer.build_model(cfg))


def run(*arguments):
    spec = importlib.util.spec_from_file_location("show_leakage", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*map(str, arguments)])


def test_the_script_writes_a_table_a_file_and_a_picture(model, tmp_path, capsys):
    weights = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, weights)
    models = [word for title in ("a", "b") for word in ("--model", title, tiny.RCNN, weights)]
    assert run(*models, "--images-per-batch", 4, "--output", tmp_path / "out", "--opts", *EVERYTHING) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in WAYS.values())
    stored = json.loads((tmp_path / "out" / "leakage.json").read_text())
    assert list(stored) == ["a", "b"]
    assert list(stored["a"]) == list(WAYS)
    assert (tmp_path / "out" / "leakage.png").stat().st_size > 5000


def test_the_script_tells_mistakes_in_one_line(digits, tmp_path, capsys):
    one = ("--model", "a", tiny.RCNN, tmp_path / "none.pth")
    assert run(*one, "--output", tmp_path) == 2
    assert "MODEL.WEIGHTS must name a file" in capsys.readouterr().err
    (tmp_path / "none.pth").write_bytes(b"")
    assert run(*one, *one, "--output", tmp_path) == 2
    assert "--model" in capsys.readouterr().err

"""Mini-batches at inference as in training: of as many images as were normalized together, and of which images."""

from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from torch import nn

from bnext.checkpoints.checkpointer import load_model
from bnext.evaluation.compare import compare_statistics
from bnext.layers import BatchNorm2d, NormSpec
from bnext.repair.kinds import count_images_as_trained, find_obstacle
from bnext.scope.statistics import frozen_statistics
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
KIND = "mini_batch_as_trained"


@pytest.fixture(scope="module")
def weights(finished):
    return str(Path(finished[0].OUTPUT_DIR, "model_final.pth"))


def load(output, weights, resnets, retinanet, *opts):
    """A config with 4 images per step, and its model, with so many images normalized together; 0: all."""
    sizes = ("MODEL.BNEXT.RESNETS.NORMALIZATION_BATCH_SIZE", resnets)
    sizes += ("MODEL.BNEXT.RETINANET.NORMALIZATION_BATCH_SIZE", retinanet)
    cfg = tiny.load(output, "TEST.PRECISE_BN.ENABLED", True, *sizes, *opts)
    return cfg, load_model(cfg, weights)


def record_batches(model):
    """The files of each batch that is evaluated."""
    batches = []

    def keep(module, args):
        if not module.training:
            batches.append([Path(record["file_name"]).name for record in args[0]])

    model.register_forward_pre_hook(keep)
    return batches


def list_files(name, number):
    return [Path(record["file_name"]).name for record in DatasetCatalog.get(name)[:number]]


def cut(names, size):
    return [names[start : start + size] for start in range(0, len(names), size)]


@pytest.mark.parametrize(("resnets", "retinanet", "expected"), [(0, 0, 4), (2, 2, 2), (3, 3, 2), (2, 3, 2), (8, 0, 4)])
def test_as_many_images_are_evaluated_together_as_training_normalizes(weights, tmp_path, resnets, retinanet, expected):
    """Four images that are cut at three are two groups of two; as many training images as there are to evaluate."""
    cfg, model = load(tmp_path, weights, resnets, retinanet)
    batches = record_batches(model)
    results = compare_statistics(cfg, model, [KIND])
    names = list_files("digits_val", None), list_files("digits_train", 4)
    assert batches == [*cut(names[0], expected), *cut(names[1], expected)]
    assert "bbox/AP" in results["rows"][KIND]
    assert "bbox/AP" in results["reading"]["mini_batch_train"]


def test_every_norm_gives_what_it_gives_in_training(weights, tmp_path):
    cfg, model = load(tmp_path, weights, 2, 2)
    norm, calls = model.backbone.bottom_up.stem.conv1.norm, []

    def keep(module, args, output):
        if not module.training:
            calls.append((args[0].clone(), output.clone()))  # the ReLU works in place

    handle = norm.register_forward_hook(keep)
    compare_statistics(cfg, model, [KIND])
    handle.remove()
    inputs, outputs = zip(*calls[:2], strict=True)
    with frozen_statistics(model), torch.no_grad():
        expected = norm.train()(torch.cat(inputs))
    torch.testing.assert_close(torch.cat(outputs), expected)


def test_norms_that_differ_have_no_number_of_images(weights, tmp_path):
    cfg, model = load(tmp_path, weights, 2, 0)
    results = compare_statistics(cfg, model, ["moving_average", KIND])
    reason = results["not_applicable"][KIND]
    assert reason.startswith("norms differ in how many images they normalize together in training: 2 in backbone.")
    assert " and 4 in head." in reason
    assert list(results["rows"]) == ["moving_average"]
    assert "bbox/AP" not in results["reading"]["mini_batch_train"]


def test_norms_of_torch_are_of_all_images_and_those_of_roi_heads_of_none():
    model = nn.ModuleDict({"backbone": BatchNorm2d(3, NormSpec(normalization_batch_size=2)), "roi_heads": nn.Module()})
    model["roi_heads"].norm = BatchNorm2d(3, NormSpec(normalization_batch_size=16))
    assert count_images_as_trained(model, 8) == {2: "backbone"}
    assert find_obstacle(model, KIND, 8) is None
    model["neck"] = nn.BatchNorm2d(3)
    assert find_obstacle(model, KIND, 8).endswith("2 in backbone and 8 in neck")
    assert find_obstacle(model, KIND, 2) is None
    del model["backbone"], model["neck"]
    assert count_images_as_trained(model, 8) == {8: ""}

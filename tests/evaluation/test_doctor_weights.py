"""Files that the doctor reads: complete ones, parts, folded ones, and such as do not fit."""

import pickle

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

import bnext
from bnext.checkpoints import Checkpointer
from bnext.config import load_config
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.evaluation.doctor import examine_detector
from bnext.evaluation.doctor_weights import load_weights
from tests import tiny
from tests.cases import randomize

R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def make_model(norm=bnext.BatchNorm2d, bias=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), norm(4), nn.Conv2d(4, 4, 1, bias=bias), norm(4))


def save(model, path, *left_out, **others):
    state = model.state_dict()
    for key in left_out:
        del state[key]
    torch.save({"model": state, **others}, path)
    return str(path)


def read(path, model=None):
    return load_weights(CfgNode({"MODEL": {"WEIGHTS": str(path)}}), make_model() if model is None else model)


def test_a_file_of_ours_says_everything(tmp_path):
    model = make_model()
    randomize(model)
    model[1].spec = model[1].spec.replace(eps=1e-3)
    Checkpointer(model, str(tmp_path)).save("model", iteration=7)
    before = (tmp_path / "model.pth").read_bytes()

    target = make_model()
    weights, failures = read(tmp_path / "model.pth", target)

    assert not failures
    assert weights.is_loaded
    assert not weights.missing + weights.without_statistics
    assert weights.is_folded is False
    assert weights.without_statistics == ()
    assert weights.iteration == 7
    assert weights.eps == {"1": 1e-3, "3": 1e-5}
    assert weights.statistics == {"1": "shared", "3": "shared"}
    assert not weights.missing
    assert not weights.unexpected
    assert torch.equal(target[1].running_mean, model[1].running_mean)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_part_says_what_is_missing(tmp_path):
    keys = [key for key in make_model().state_dict() if key.startswith("3.")]
    lost = [*keys, "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    path = save(make_model(), tmp_path / "part.pth", *lost, iteration="last")

    weights, _ = read(path)

    assert weights.is_loaded
    assert weights.missing == ("3",)
    assert weights.without_statistics == ("1",)
    assert weights.iteration is None


def test_a_file_without_statistics_is_told(tmp_path):
    keys = [key for key in make_model().state_dict() if key.endswith(("mean", "var", "tracked"))]

    weights, _ = read(save(make_model(), tmp_path / "affine.pth", *keys))

    assert weights.missing == ()
    assert weights.without_statistics == ("1", "3")


def test_what_has_no_place_is_named(tmp_path):
    state = {**make_model().state_dict(), "7.weight": torch.ones(3)}
    torch.save({"model": state}, tmp_path / "more.pth")

    weights, _ = read(tmp_path / "more.pth")

    assert weights.unexpected == ("7.weight",)
    assert not weights.missing + weights.without_statistics


def test_frozen_norms_whose_affine_does_all_are_folded(tmp_path):
    model = make_model(FrozenBatchNorm2d)
    model[1].bias += 1

    weights, _ = read(save(model, tmp_path / "frozen.pth"), make_model(nn.BatchNorm2d))

    assert weights.is_folded
    assert weights.folded == ("1",)


def test_norms_that_were_counted_are_not_folded(tmp_path):
    model = make_model(nn.BatchNorm2d)
    model[1].bias.data += 1

    weights, _ = read(save(model, tmp_path / "live.pth"), make_model(nn.BatchNorm2d))

    assert not weights.is_folded


def test_a_file_of_caffe2_is_folded(tmp_path):
    blobs = {"0.weight": torch.ones(4, 3, 1, 1).numpy(), "1.weight": torch.ones(4).numpy() * 2}
    blobs["1.bias"] = torch.ones(4).numpy()
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps({"model": blobs, "__author__": "Caffe2", "matching_heuristics": False}))

    weights, _ = read(file)

    assert weights.folded == ("1",)
    assert weights.without_statistics == ("1",)


def test_norms_that_are_gone_are_folded(tmp_path):
    model = make_model(nn.BatchNorm2d)
    randomize(model)
    bnext.fold_norms(model.eval())
    state = dict(model.state_dict())  # without torch's metadata
    torch.save({"model": state}, tmp_path / "folded.pth")

    weights, failures = read(tmp_path / "folded.pth")

    assert not failures
    assert weights.is_folded
    assert not weights.folded
    assert weights.missing == ("1", "3")


@pytest.mark.parametrize("bias", [True, False])
def test_a_file_of_a_folded_model_that_says_so_is_refused(tmp_path, bias):
    model = make_model(nn.BatchNorm2d, bias=bias)
    randomize(model)
    bnext.fold_norms(model.eval())

    weights, failures = read(save(model, tmp_path / "folded.pth"), make_model(bias=bias))

    assert weights.is_folded
    assert not weights.is_loaded
    assert len(failures) == 1


@pytest.mark.parametrize("content", [b"", b"<html>", None])
def test_a_file_that_cannot_be_loaded_changes_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "model.pth").write_bytes(content)
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    weights, failures = read(tmp_path / "model.pth", model)

    assert weights.source
    assert not weights.is_loaded
    assert weights.is_folded is None
    assert len(failures) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_said_while_it_loads(tmp_path, caplog):
    save(make_model(), tmp_path / "part.pth", "3.weight")

    read(tmp_path / "part.pth")

    assert not caplog.records


def test_nothing_is_fetched():
    weights, failures = read("https://example.invalid/model.pth")

    assert weights.source
    assert not weights.is_loaded
    assert not failures


# ---- detectors


def examine(config, *pairs):
    cfg = load_config(str(config), list(pairs))
    origin = Origin("config", str(config), pairs, cfg.MODEL.WEIGHTS)
    return examine_facts(examine_detector(cfg, origin)[0])


def find(diagnosis, code):
    return [finding.evidence for finding in diagnosis.findings if finding.code == code]


@pytest.mark.parametrize(("norm", "number"), [("BN", 1), ("FrozenBN", 0)])
def test_a_backbone_of_the_zoo_is_known_to_be_folded(norm, number):
    pairs = ("MODEL.WEIGHTS", R50, "MODEL.RESNETS.NORM", norm, "MODEL.DEVICE", "meta")

    found = find(examine(tiny.CONFIG, *pairs), "BN020")

    assert [evidence.severity for evidence in found] == ["note"] * number
    assert all(evidence.remedy.keys == {"MODEL.RESNETS.NORM": "FrozenBN"} for evidence in found)


def test_frozen_norms_of_a_random_initialization_are_found():
    pairs = ("MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2")

    (evidence,) = find(examine(tiny.CONFIG, *pairs), "BN006")
    mended = [str(word) for pair in evidence.remedy.keys.items() for word in pair]

    assert evidence.severity == "error"
    assert not find(examine(tiny.CONFIG, *pairs, *mended), "BN006")


def test_row_2_of_a_config_is_found_and_mended():
    pairs = ("MODEL.BNEXT.RETINANET.STATISTICS", "shared", "MODEL.BNEXT.RETINANET.POPULATION", "per_level")

    (evidence,) = find(examine(tiny.CONFIG, *pairs), "BN002")
    mended = [str(word) for pair in evidence.remedy.keys.items() for word in pair]

    assert evidence.severity == "error"
    assert not find(examine(tiny.CONFIG, *pairs, *mended), "BN002")

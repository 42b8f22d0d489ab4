"""A checkpoint in the form of another config's model; nothing is lost without a word, and the input stays."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from bnext.checkpoints import load_model
from bnext.cli.convert import ConvertRequest, _read_map, convert_checkpoint
from bnext.errors import CheckpointError, ConfigError
from tests import saved, tiny

POPULATION = "MODEL.BNEXT.RETINANET.POPULATION"
AFFINE = "MODEL.BNEXT.RETINANET.AFFINE"
PLAIN = (AFFINE, "shared")


def load(weights, *opts, config=tiny.CONFIG):
    return tiny.load(weights.parent / "unused", "MODEL.WEIGHTS", weights, *opts, config=config)


def read(path):
    return torch.load(path)["model"]


def test_statistics_of_levels_from_shared_ones_and_back(weights, tmp_path, capsys):
    before = weights.read_bytes()
    levels, plain = tmp_path / "levels.pth", tmp_path / "plain.pth"
    report = convert_checkpoint(load(weights, POPULATION, "per_level"), ConvertRequest(output=str(levels)))
    assert report["keeps_outputs"]
    assert "copied to every level" in capsys.readouterr().out
    assert torch.equal(read(levels)["head.cls_subnet.1.p3.running_var"], read(weights)["head.cls_subnet.1.running_var"])

    back = convert_checkpoint(load(levels), ConvertRequest(output=str(plain)))
    assert back["missing"] == []
    assert not saved.buffers_that_differ(read(weights), read(plain))
    assert weights.read_bytes() == before
    assert json.loads((tmp_path / "plain.json").read_text())["weights"] == str(levels)
    assert "optimizer" not in torch.load(plain)


def test_what_a_conversion_changes_is_said(weights, tmp_path, capsys):
    state = torch.load(weights)
    for index, level in enumerate(("p3", "p4", "p5", "p6", "p7")):
        state["model"][f"head.cls_subnet.1.{level}.weight"].fill_(index + 1.0)
    torch.save(state, tmp_path / "in.pth")
    report = convert_checkpoint(load(tmp_path / "in.pth", *PLAIN), ConvertRequest(output=str(tmp_path / "out.pth")))
    assert not report["keeps_outputs"]
    assert "bnext compare" in capsys.readouterr().out


def test_one_level_of_a_norm_for_all(weights, tmp_path):
    state = torch.load(weights)
    state["model"]["head.cls_subnet.1.p5.weight"].fill_(7.0)
    torch.save(state, tmp_path / "in.pth")
    request = ConvertRequest(output=str(tmp_path / "out.pth"), domain_map=_read_map(["p3=p5"]))
    convert_checkpoint(load(tmp_path / "in.pth"), request)
    assert read(tmp_path / "out.pth")["head.cls_subnet.1.p3.weight"].eq(7).all()
    with pytest.raises(ConfigError, match="domain_map"):
        convert_checkpoint(
            load(tmp_path / "in.pth"), ConvertRequest(output=str(tmp_path / "no.pth"), domain_map={"p9": "p5"})
        )


def test_how_statistics_came_about_stays_known(weights, tmp_path):
    """A file that does not say it stays one that does not; rows 1 and 3 have the same keys."""
    convert_checkpoint(load(weights), ConvertRequest(output=str(tmp_path / "unknown.pth")))
    assert torch.load(tmp_path / "unknown.pth")["norm_specs"] == {}

    state = torch.load(weights)
    state["norm_specs"] = {"head.cls_subnet.1": {"statistics": "shared", "eps": 1e-3}}
    torch.save(state, tmp_path / "in.pth")
    convert_checkpoint(load(tmp_path / "in.pth"), ConvertRequest(output=str(tmp_path / "out.pth")))
    specs = torch.load(tmp_path / "out.pth")["norm_specs"]
    assert set(specs) == {"head.cls_subnet.1"}
    assert (specs["head.cls_subnet.1"]["statistics"], specs["head.cls_subnet.1"]["eps"]) == ("shared", 1e-3)


def test_a_folded_checkpoint(weights, tmp_path):
    report = convert_checkpoint(load(weights), ConvertRequest(output=str(tmp_path / "out.pth"), fold=True))
    assert len(report["folded"]) == 21
    assert "backbone.bottom_up.stem.conv1.bias" in read(tmp_path / "out.pth")
    with pytest.raises(CheckpointError):
        load_model(load(weights), str(tmp_path / "out.pth"))


def make_torchvision(path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    torch.save(model.state_dict(), path)
    return model


def test_a_resnet_of_torchvision_computes_the_same(tmp_path, capsys):
    model = make_torchvision(tmp_path / "resnet18.pth")
    opts = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    report = convert_checkpoint(
        load(tmp_path / "resnet18.pth", *opts), ConvertRequest(output=str(tmp_path / "out.pth"))
    )
    assert {"fc.weight", "fc.bias"} == set(report["left_out"])
    assert all(key.startswith(("head.", "backbone.fpn_", "backbone.top_block")) for key in report["missing"])
    assert "INPUT.FORMAT: RGB" in capsys.readouterr().out

    backbone = build_model(load(tmp_path / "resnet18.pth", *opts)).eval().backbone.bottom_up
    prefix = "backbone.bottom_up."
    state = {key[len(prefix) :]: value for key, value in read(tmp_path / "out.pth").items() if key.startswith(prefix)}
    backbone.load_state_dict(state)
    pictures = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        stages = model.maxpool(model.relu(model.bn1(model.conv1(pictures))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            stages = getattr(model, name)(stages)
        torch.testing.assert_close(backbone(pictures)["res5"], stages)


def test_weights_of_another_shape_are_not_taken_for_loaded(weights, tmp_path, capsys):
    """Torch and fvcore leave them out; what the model had instead, random numbers, is nothing to write."""
    state = torch.load(weights)
    state["model"]["backbone.fpn_lateral3.weight"] = torch.zeros(16, 3, 1, 1)
    torch.save(state, tmp_path / "in.pth")
    report = convert_checkpoint(load(tmp_path / "in.pth"), ConvertRequest(output=str(tmp_path / "out.pth")))
    assert report["of_another_shape"] == ["backbone.fpn_lateral3.weight"]
    assert "backbone.fpn_lateral3.weight" not in read(tmp_path / "out.pth")
    assert "Of another shape" in capsys.readouterr().out


def test_what_is_refused_writes_nothing(weights, tmp_path):
    make_torchvision(tmp_path / "resnet18.pth")
    stem = ("MODEL.RESNETS.STEM_OUT_CHANNELS", 64)
    output = str(tmp_path / "out.pth")
    for cfg, request, error, thing in (
        (load(weights), ConvertRequest(output=str(weights)), ConfigError, "another file"),
        (load(weights), ConvertRequest(output=str(tmp_path / "a.onnx")), ConfigError, "end in .pth"),
        (load(weights), ConvertRequest(output=output, domain="p3"), ConfigError, "--domain must come with --fold"),
        (load(tmp_path / "resnet18.pth", *stem), ConvertRequest(output=output, fold=True), CheckpointError, "folded"),
    ):
        with pytest.raises(error, match=thing):
            convert_checkpoint(cfg, request)
    assert not list(tmp_path.glob("out*"))

    for words in (["night"], ["night=day", "night=dusk"]):
        with pytest.raises(ConfigError, match="--domain-map"):
            _read_map(words)

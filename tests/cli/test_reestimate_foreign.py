"""Checkpoints of architectures that are not bnext's: detectron2's own RetinaNet and FCOS, and what a user registers."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer, load_model
from bnext.cli.reestimate import RecomputeRequest
from bnext.cli.reestimate import run_request as run
from bnext.errors import CheckpointError, ConfigError, StatisticsError
from tests import tiny
from tests.saved import load, save

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def find_shapes(cfg, backbone):
    return [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]


@pytest.fixture(scope="module", autouse=True)
def architectures():
    """Detectron2's heads with one nn.BatchNorm2d for all levels, registered as a user does."""

    def SharedRetinaNet(cfg):
        arguments = RetinaNet.from_config(cfg)
        of_head = RetinaNetHead.from_config(cfg, find_shapes(cfg, arguments["backbone"]))
        return RetinaNet(**{**arguments, "head": RetinaNetHead(**{**of_head, "norm": nn.BatchNorm2d})})

    def SharedFCOS(cfg):
        backbone = build_backbone(cfg)
        shapes = find_shapes(cfg, backbone)
        head = FCOSHead(input_shape=shapes, num_classes=10, conv_dims=[shapes[0].channels], norm=nn.BatchNorm2d)
        pixels = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
        levels = cfg.MODEL.RETINANET.IN_FEATURES
        return FCOS(backbone=backbone, head=head, head_in_features=levels, num_classes=10, **pixels)

    META_ARCH_REGISTRY.register(SharedRetinaNet)
    META_ARCH_REGISTRY.register(SharedFCOS)
    yield
    for name in ("SharedRetinaNet", "SharedFCOS"):
        META_ARCH_REGISTRY._obj_map.pop(name)


def choose(architecture):
    return ("MODEL.META_ARCHITECTURE", architecture, *tiny.NO_LEVELS)


def read(path):
    return torch.load(path)["model"]


def read_means(path, norm, number):
    state = torch.load(path)["model"]
    return [state[f"{norm}.{level}.running_mean"] for level in range(number)]


@pytest.mark.parametrize("architecture", ["SharedRetinaNet", "SharedFCOS"])
def test_a_head_of_others_gets_statistics_of_each_level(digits, architecture, tmp_path, capsys):
    weights = save(tmp_path / "in.pth", tiny.CONFIG, *choose(architecture))
    cfg, before = load(weights, *choose(architecture)), weights.read_bytes()
    run(cfg, RecomputeRequest(output=str(tmp_path / "out.pth"), population="per_level"))
    assert weights.read_bytes() == before

    number = len(cfg.MODEL.RETINANET.IN_FEATURES)
    levels = json.loads((tmp_path / "out.json").read_text())["levels"]
    assert all(names == [str(index) for index in range(number)] for names in levels.values())
    for path in levels:
        means = read_means(tmp_path / "out.pth", path, number)
        assert all(not torch.equal(means[0], mean) for mean in means[1:])
    said = capsys.readouterr().out
    assert "CycleBatchNormList" in said
    assert "count_levels" in said

    model = load_model(cfg, str(tmp_path / "out.pth"))  # the same config
    assert all(torch.equal(model.state_dict()[key], value) for key, value in read(tmp_path / "out.pth").items())
    copied = build_model(cfg)
    Checkpointer(copied).load(str(tmp_path / "out.pth"), checkpointables=[])  # a training: its parameters stay
    assert copied.state_dict().keys() == read(weights).keys()

    if architecture == "SharedRetinaNet":  # detectron2's own, which has such norms by a name
        model = build_model(load(weights, *choose("RetinaNet"), "MODEL.RETINANET.NORM", "BN"))
        DetectionCheckpointer(model).load(str(tmp_path / "out.pth"))
        norm = next(module for module in model.modules() if isinstance(module, CycleBatchNormList))
        assert torch.equal(norm[1].running_mean, read_means(tmp_path / "out.pth", next(iter(levels)), number)[1])


@pytest.mark.parametrize("population", [None, "per_level"])
def test_detectron2s_own_retinanet_is_estimated_as_it_is_laid_out(digits, population, tmp_path, capsys):
    opts = (*choose("RetinaNet"), "MODEL.RETINANET.NORM", "BN")
    weights = save(tmp_path / "in.pth", tiny.CONFIG, *opts)
    run(load(weights, *opts), RecomputeRequest(output=str(tmp_path / "out.pth"), population=population))
    before, after = (torch.load(path)["model"] for path in (weights, tmp_path / "out.pth"))
    assert before.keys() == after.keys()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert {key for key in before if key.startswith("head.") and "running_mean" in key} <= changed
    assert "count_levels" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("opts", "population", "message"),
    [
        (("MODEL.RETINANET.NORM", "BN"), "shared", "per_level"),
        (("MODEL.RETINANET.NORM", ""), "per_level", "called on several levels"),
    ],
)
def test_what_a_head_of_others_cannot_have_is_refused(digits, opts, population, message, tmp_path):
    opts = (*choose("RetinaNet"), *opts)
    weights = save(tmp_path / "in.pth", tiny.CONFIG, *opts)
    with pytest.raises((ConfigError, StatisticsError), match=message):
        run(load(weights, *opts), RecomputeRequest(output=str(tmp_path / "out.pth"), population=population))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth"]


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(digits, tmp_path):
    weights = save(tmp_path / "in.pth", tiny.CONFIG, *choose("SharedRetinaNet"))
    cfg = load(weights, *choose("SharedRetinaNet"))
    run(cfg, RecomputeRequest(output=str(tmp_path / "out.pth"), population="per_level"))
    data = torch.load(tmp_path / "out.pth")

    for damage in (
        lambda: data["model"].pop("head.cls_score.bias"),
        lambda: data["recomputed_statistics"].update(levels={"head.cls_subnet.1": 5}),
    ):
        damage()
        torch.save(data, tmp_path / "damaged.pth")
        model = build_model(cfg)
        before = list(model.modules())
        with pytest.raises(CheckpointError):
            Checkpointer(model).load(str(tmp_path / "damaged.pth"), checkpointables=[], complete=True)
        assert list(model.modules()) == before
        assert not model._forward_pre_hooks

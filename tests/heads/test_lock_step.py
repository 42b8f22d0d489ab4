"""Lock-step over levels: a level norm meets all levels in one call, everything else each level alone."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from bnext import add_bnext_config
from bnext.errors import ConfigError, StatisticsError
from bnext.heads.lock_step import make_head_norm, run_tower, run_towers
from bnext.layers import LevelBatchNorm2d, NormSpec
from bnext.surgery import fold_norms
from tests.cases import LEVELS, NUM_CHANNELS, make_features, make_norm


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_features_is_refused(number):
    with pytest.raises(ConfigError, match=rf"got {number} features for the levels.*IN_FEATURES"):
        run_towers(SimpleNamespace(levels=("p3", "p4")), (), [torch.zeros(1)] * number)


def test_a_spec_becomes_a_factory_and_names_stay():
    norm = make_head_norm(NormSpec.from_table5_row(6), LEVELS)(NUM_CHANNELS)
    assert isinstance(norm, LevelBatchNorm2d)
    assert (norm.levels, norm.spec.table5_row) == (LEVELS, 6)
    for name in ("FrozenBN", "", nn.BatchNorm2d):
        assert make_head_norm(name, LEVELS) is name


def test_group_norm_has_the_groups_of_detectron2_and_can_be_tried_on_one_channel():
    make = make_head_norm("GN", LEVELS)
    assert [make(channels).num_groups for channels in (1, 32, 256)] == [1, 32, 32]
    with pytest.raises(ConfigError, match=r"got 'GN' for 48 \(.*divisible.*\)\. Use a multiple of 32"):
        make(48)


def test_names_of_batch_norms_are_bnexts_with_statistics_per_level():
    norm = make_head_norm("SyncBN", LEVELS)(NUM_CHANNELS)
    assert (type(norm), norm.levels) == (LevelBatchNorm2d, LEVELS)
    assert norm.spec == NormSpec.from_table5_row(4, workers="all")
    assert make_head_norm("SyncBN", None)(NUM_CHANNELS).spec == NormSpec(workers="all")


def test_a_tower_applies_convolutions_per_level_and_the_norm_to_all():
    conv, norm, same = (
        nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1).double(),
        *(make_norm(NormSpec.from_table5_row(1)) for _ in range(2)),
    )
    calls = []
    norm.register_forward_hook(lambda module, args, output: calls.append(list(args[0])))
    features = make_features()
    outputs = run_tower(nn.Sequential(conv, norm, nn.ReLU()).train(), features)
    expected = same.train()({level: conv(feature) for level, feature in features.items()})
    assert calls == [list(LEVELS)]
    assert all(torch.equal(outputs[level], expected[level].relu()) for level in LEVELS)


@pytest.mark.parametrize("architecture", ["BNextRetinaNet", "BNextFCOS"])
def test_a_level_that_the_backbone_has_not_is_named(architecture):
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = architecture, "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p8"]
    with pytest.raises(ConfigError, match=r"MODEL.RETINANET.IN_FEATURES must name features .* got 'p8'"):
        build_model(cfg)


def test_a_head_that_was_folded_for_one_level_refuses_the_others():
    tower = nn.Sequential(nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1), make_norm(NormSpec.from_table5_row(4)), nn.ReLU())
    tower, features = tower.double().eval(), make_features()
    expected = run_tower(tower, features)["p4"]
    fold_norms(tower, "p4")
    torch.testing.assert_close(run_tower(tower, {"p4": features["p4"]})["p4"], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(StatisticsError, match="p3"):
        run_tower(tower, features)

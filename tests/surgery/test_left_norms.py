"""Reports name the norms that stay what they are, and why."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnext import notices
from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.layers.forms import find_forms, find_other_norms
from bnext.surgery import check_norm_state, convert_norm, fold_norms, freeze_norms
from tests.cases import randomize

OTHERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "LazyBatchNorm2d": nn.LazyBatchNorm2d,
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
}


def make(*others):
    return nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "head": nn.Sequential(*others)})


@pytest.mark.parametrize("name", OTHERS)
def test_a_conversion_names_what_it_left(name):
    model = make(OTHERS[name](), OTHERS[name]())
    report = convert_norm(model, {"": NormSpec(workers="all")})
    assert report.left.keys() == {"head.0", "head.1"}
    assert "nothing was lost" not in str(report)
    for text in ("2 norms", "head.0", name):
        assert text in str(report)
    assert type(model["head"][0]).__name__ == name

    assert not convert_norm(model, {"body": NormSpec()}).left  # the head is not asked for
    with pytest.raises(ConfigError, match=f"'head', {name}"):
        convert_norm(model, {"head": NormSpec()})


def test_the_norms_of_a_model_are_counted_once():
    model = make(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), BatchNorm2d(4))
    assert find_other_norms(model).keys() == {"head.0"}
    assert {path for path, *_ in find_forms(model)} == {"body.1", "head.1", "head.2"}


def test_a_fold_names_norms_that_are_none_of_its_concern():
    model = make(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(4)).eval()
    report = fold_norms(model)
    assert report.folded.keys() == {"body.1"}
    assert report.others == {"head.0": "GroupNorm", "head.1": "InstanceNorm2d", "head.2": "LayerNorm"}
    assert not report.left
    assert "GroupNorm" in str(report)


def test_a_model_without_weights_is_not_folded():
    with pytest.raises(ConfigError, match=r"LazyConv2d \(head.0\)"):
        fold_norms(make(nn.LazyConv2d(4, 1)).eval())


def test_a_freeze_names_statistics_that_go_on_moving(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_told_names", set())
    model = make(OTHERS["InstanceNorm2d"](), nn.LayerNorm(4))
    with caplog.at_level(logging.WARNING, logger="bnext"):
        assert freeze_norms(model, "affine") == ("body.1",)
        assert not caplog.text
        assert freeze_norms(model) == ("body.1",)
    assert "head.0 (InstanceNorm2d)" in caplog.text
    assert "head.1" not in caplog.text


@pytest.mark.parametrize("make_norm", [nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm1d])
def test_state_of_other_dimensions_is_checked(make_norm):
    model = make(randomize(make_norm(4, affine=True, track_running_stats=True)))
    randomize(model["body"])
    assert check_norm_state(model) == []
    model["head"][0].running_mean[2] = float("nan")
    model["head"][0].running_var[1] = -1.0
    assert [(finding.path, finding.kind) for finding in check_norm_state(model)] == [
        ("head.0", "mean"),
        ("head.0", "variance"),
    ]


class NormAct(nn.BatchNorm2d):
    """Norm, drop-out and activation in one module, laid out as timm's."""

    def __init__(self, num_features, act):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


def make_with_act(act):
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4, act))).eval()


@pytest.mark.parametrize("change", [lambda model: convert_norm(model, {"": NormSpec()}), fold_norms])
def test_a_norm_with_an_idle_activation_is_a_norm(change):
    model, images = make_with_act(nn.Identity()), torch.randn(2, 3, 5, 5)
    expected = model(images).detach()
    report = change(model)
    assert not report.left
    torch.testing.assert_close(model(images).detach(), expected)
    assert not isinstance(model[1], NormAct)


def test_an_activation_is_not_lost():
    model = make_with_act(nn.ReLU())
    for treat_as in (None, {NormAct: nn.BatchNorm2d}):
        with pytest.raises(ConfigError, match=r"NormAct: ReLU .*\(1\)"):
            convert_norm(model, {"": NormSpec()}, treat_as=treat_as)
    assert fold_norms(model).left.keys() == {"1"}

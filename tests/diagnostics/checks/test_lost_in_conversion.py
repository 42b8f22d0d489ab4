import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import bnext
from tests.diagnostics.checks.diagnosing import find


class Gated(nn.BatchNorm2d):
    """A norm with more than a norm."""

    def forward(self, x):
        return super().forward(x).sigmoid() * x


class Active(nn.BatchNorm2d):
    """Norm, drop-out and activation in one module, laid out as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncActive(nn.SyncBatchNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Scaled(nn.BatchNorm2d):
    """A norm with state of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("target", torch.ones(channels))


def make_model(norm=nn.BatchNorm2d, **options):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4, **options), nn.Conv2d(4, 4, 1), norm(4, **options))
    for layer in (model[1], model[3]):
        if layer.running_mean is not None:
            layer.running_mean += 1
    return model


def synchronize(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


@pytest.mark.parametrize(("norm", "severity"), [(Gated, "error"), (Active, "error"), (Scaled, "warning")])
def test_finds_a_class_that_was_dropped(norm, severity):
    model = make_model(norm)

    (evidence,) = find("BN029", synchronize(model), before=model)

    assert evidence.severity == severity
    assert evidence.layers == ("1", "3")
    assert norm.__name__ in evidence.text


def test_conversions_that_keep_everything_are_healthy():
    model = make_model()
    ours = copy.deepcopy(model)
    lossy = find("BN029", synchronize(make_model(Scaled)), before=make_model(Scaled))
    exec(lossy[0].remedy.call, {"bnext": bnext, "before": ours})

    assert not find("BN029", synchronize(model), before=model)
    assert not find("BN029", ours, before=model)
    assert not find("BN029", make_model(SyncActive), before=make_model(Active))
    assert not find("BN029", copy.deepcopy(model), before=model)


@pytest.mark.parametrize("name", ["BN", "SyncBN", "FrozenBN", "GN"])
def test_convert_norm_is_healthy(name):
    model = make_model(eps=1e-3, momentum=0.01)
    converted = copy.deepcopy(model)
    bnext.convert_norm(converted, {"": name})

    assert not find("BN029", converted, before=model)


def test_frozen_norms_that_become_live_are_healthy():
    model = make_model(FrozenBatchNorm2d)
    converted = copy.deepcopy(model)
    bnext.convert_norm(converted, {"": "BN"})

    assert not find("BN029", converted, before=model)


def test_a_population_for_each_level_that_was_copied_is_healthy():
    levels = ("p3", "p4")
    model = nn.Sequential(bnext.LevelBatchNorm2d(3, levels, bnext.NormSpec.from_table5_row(1)))
    model[0].running_mean += 1
    converted = copy.deepcopy(model)
    bnext.convert_norm(converted, population="per_level")

    assert not find("BN029", converted, before=model)
    converted[0].p4.running_mean += 1
    assert find("BN029", converted, before=model)


def change_momentum(model):
    model[1].momentum = 0.3


def drop_affine(model):
    model[1] = nn.BatchNorm2d(4, affine=False)
    model[1].running_mean += 1


def drop_statistics(model):
    model[1] = nn.BatchNorm2d(4, track_running_stats=False)


def forget_statistics(model):
    model[1] = nn.BatchNorm2d(4)


def change_statistics(model):
    model[1].running_var *= 1.01


def drop_norm(model):
    model[1] = nn.ReLU()


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        (change_momentum, "warning"),
        (drop_affine, "error"),
        (drop_statistics, "error"),
        (forget_statistics, "error"),
        (change_statistics, "warning"),
        (drop_norm, "error"),
    ],
)
def test_finds_what_was_not_carried_over(change, severity):
    model = make_model()
    converted = copy.deepcopy(model)
    change(converted)

    (evidence,) = find("BN029", converted, before=model)

    assert evidence.severity == severity
    assert evidence.layers == ("1",)


def test_rounding_to_half_precision_is_healthy():
    model = make_model()
    model[1].running_mean += torch.rand(4)

    assert not find("BN029", copy.deepcopy(model).half(), before=model)


def test_the_remedy_of_a_momentum_gives_it_back():
    model = make_model()
    converted = copy.deepcopy(model)
    change_momentum(converted)

    exec(find("BN029", converted, before=model)[0].remedy.call, {"model": converted})

    assert not find("BN029", converted, before=model)


def test_statistics_that_nobody_wrote_are_found_where_there_were_none():
    (evidence,) = find(
        "BN029", nn.Sequential(nn.BatchNorm2d(4)), before=nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    )

    assert evidence.severity == "warning"


def test_folded_norms_are_a_note():
    model = make_model().eval()
    folded = copy.deepcopy(model)
    bnext.fold_norms(folded)

    (evidence,) = find("BN029", folded, before=model)

    assert evidence.severity == "note"


def test_a_model_with_other_names_says_nothing():
    assert not find("BN029", make_model(), before=nn.ModuleDict({"body": make_model()}))

"""Forms of norms: their keys, what they leave over, and classes that somebody must vouch for."""

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, forms
from bnext.layers.forms import find_form, find_forms, find_kind, find_leftovers, register_form
from tests.surgery.norm_forms import FORMS, make


@pytest.mark.parametrize("name", FORMS)
def test_the_form_says_the_keys_and_nothing_is_left_over(name):
    norm = make(name)
    form = find_form(norm)
    assert set(form.list_keys()) == set(norm.state_dict())
    refused, notes = find_leftovers(norm, form)
    assert not refused
    if name == "detectron2_naive_sync":
        assert "_stats_mode" in notes[0]
        assert "training other than torch's (NaiveSyncBatchNorm)" in notes[0]
    else:
        assert not notes
    model = nn.ModuleDict({"a": nn.ModuleDict({"norm": norm}), "b": nn.ModuleDict({"norm": norm})})
    assert [path for path, *_ in find_forms(model)] == ["a.norm", "b.norm"]


def test_lists_whose_items_are_called_are_no_norm():
    lists = nn.ModuleDict({"norms": nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))})
    assert [path for path, *_ in find_forms(lists)] == ["norms.0", "norms.1"]


class Bounded(nn.BatchNorm2d):
    """A norm of somebody else's, with a forward of its own."""

    def forward(self, input):
        return super().forward(input).clamp(-9, 9)


class Inherits(Bounded):
    pass


class Apart(nn.Module):
    """A norm that is of no class of torch's."""

    def __init__(self):
        super().__init__()
        self.num_features, self.eps = 4, 1e-3
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.ones(4))

    def forward(self, input):
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), FrozenBatchNorm2d(4), BatchNorm2d(4)])
def test_classes_of_torch_torchvision_and_bnext_are_known(norm):
    assert find_kind(norm) is type(norm)


@pytest.mark.parametrize("norm", [Bounded(4), Inherits(4)])
def test_a_forward_of_its_own_is_vouched_for_by_its_class(norm):
    assert find_kind(norm) is None
    assert find_kind(norm, {Bounded: nn.BatchNorm2d}) is nn.BatchNorm2d
    assert "treat_as={" in find_leftovers(norm, find_form(norm))[0]
    assert not find_leftovers(norm, find_form(norm), {Bounded: nn.BatchNorm2d})[0]


def test_a_norm_of_another_class_has_the_form_that_it_is_treated_as():
    assert find_form(Apart()) is None
    form = find_form(Apart(), {Apart: nn.BatchNorm2d})
    assert (form.num_features, form.eps, form.affine, form.population) == (4, 1e-3, "shared", "shared")


def test_a_registered_class_is_known_from_then_on(monkeypatch):
    monkeypatch.setattr(forms, "_REGISTERED", dict(forms._REGISTERED))
    register_form(Bounded, nn.SyncBatchNorm)
    assert find_kind(Inherits(4)) is nn.SyncBatchNorm


@pytest.mark.parametrize("base", [nn.Linear, nn.InstanceNorm2d, "BatchNorm2d"])
def test_what_is_no_norm_vouches_for_nothing(base):
    with pytest.raises(ConfigError, match="treat_as"):
        find_kind(nn.BatchNorm2d(4), {Bounded: base})
    with pytest.raises(ConfigError, match="treat_as"):
        register_form(Bounded, base)

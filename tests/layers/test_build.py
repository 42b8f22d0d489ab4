"""Norms by detectron2's names: what each is, and that it is the field's."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnext import ConfigError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec, build_norm, make_named_norm, name_norms
from tests.cases import randomize


def make_images(num_channels, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shape = (2, num_channels, 3, 5)
    images = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    return images.requires_grad_(requires_grad)


@pytest.mark.parametrize(
    ("name", "answers"), [("BN", {}), ("SyncBN", {"workers": "all"}), ("FrozenBN", {"frozen": "both"})]
)
def test_batch_norms_are_points_of_one_table(name, answers):
    norm = make_named_norm(name, 8)
    assert type(norm) is BatchNorm2d
    assert norm.spec == NormSpec(**answers)
    assert all(parameter.requires_grad == (name != "FrozenBN") for parameter in norm.parameters())


@pytest.mark.parametrize(("num_channels", "num_groups"), [(64, 32), (32, 32), (8, 8)])
def test_gn_is_torchs_group_norm(num_channels, num_groups):
    norm = randomize(make_named_norm("GN", num_channels).double())
    assert type(norm) is nn.GroupNorm
    assert (norm.num_groups, norm.eps) == (num_groups, 1e-5)
    x = make_images(num_channels)
    torch.testing.assert_close(norm(x), F.group_norm(x, num_groups, norm.weight, norm.bias))


def test_ln_normalizes_the_channels_of_each_position():
    norm = randomize(make_named_norm("LN", 6).double())
    x, same = make_images(6, requires_grad=True), make_images(6, requires_grad=True)
    mean = same.mean(1, keepdim=True)
    normalized = (same - mean) / ((same - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = normalized * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    output = norm(x)
    torch.testing.assert_close(output, expected)
    factors = torch.randn_like(output)
    parameters = list(norm.parameters())
    actual = torch.autograd.grad(output, [x, *parameters], factors)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, [same, *parameters], factors))


def test_ln_is_detectron2s_where_it_has_one():
    layers = pytest.importorskip("detectron2.layers")
    theirs = layers.get_norm("LN", 6) if hasattr(layers.batch_norm, "LayerNorm") else None
    if theirs is None:
        pytest.skip("detectron2 0.6 has no LN")
    ours = make_named_norm("LN", 6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(make_images(6).float()), theirs(make_images(6).float()))


def test_no_norm_is_a_name_too():
    assert make_named_norm("", 8) is None


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"a norm must be one of 'BN', 'SyncBN', .*; got 'nnSyncBN'"):
        make_named_norm("nnSyncBN", 8)


def test_a_factory_serves_one_feature_or_levels():
    spec = NormSpec(normalization_batch_size=2)
    assert type(build_norm(spec)(8)) is BatchNorm2d
    levels = build_norm(spec, ["p3", "p4"])(8)
    assert type(levels) is LevelBatchNorm2d
    assert (levels.levels, levels.spec, levels.num_features) == (("p3", "p4"), spec, 8)


def test_norms_learn_their_paths():
    model = nn.Sequential(nn.Sequential(BatchNorm2d(3)), LevelBatchNorm2d(3, ["p3"]))
    name_norms(model)
    assert (model[0][0].path, model[1].path) == ("0.0", "1")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ln_keeps_the_memory_format(memory_format):
    images = make_images(6).float().contiguous(memory_format=memory_format)
    assert make_named_norm("LN", 6)(images).stride() == images.stride()


@pytest.mark.parametrize(
    "make",
    [
        build_norm(NormSpec()),
        build_norm(NormSpec.from_table5_row(6), ("p3", "p4")),
        *(partial(make_named_norm, name) for name in ("SyncBN", "FrozenBN", "GN", "LN")),
    ],
)
def test_factories_take_device_and_type(make):
    norm = make(4, device="meta", dtype=torch.float64)
    state = {name: value for name, value in norm.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert {(value.device.type, value.dtype) for value in state.values()} == {("meta", torch.float64)}

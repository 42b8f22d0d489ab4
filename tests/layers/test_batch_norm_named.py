"""Norms by detectron2's names are detectron2's and torch's: outputs, gradients, state."""

import pytest
import torch
from torch import nn

from bnext.errors import ConfigError
from bnext.layers import NAMED_NORMS, BatchNorm2d, LevelBatchNorm2d, NormSpec, make_named_norm, name_norms
from tests.cases import LEVELS, randomize

C = 64
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def draw(seed=0):
    return torch.randn(2, C, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def run(norm, training):
    norm.train(training)
    x = draw().requires_grad_()
    output = norm(x)
    wanted = [x, *(p for p in norm.parameters() if p.requires_grad)]
    return output, torch.autograd.grad(output.pow(3).sum(), wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BN", "SyncBN", "FrozenBN", "GN"])
def test_named_norms_are_detectron2s(name, training):
    layers = pytest.importorskip("detectron2.layers")
    # One process: SyncBN is a BN, which is what torch's own does there.
    peer = layers.get_norm(name if name != "SyncBN" else "BN", C).double()
    ours = randomize(make_named_norm(name, C).double())
    peer.load_state_dict({key: value for key, value in ours.state_dict().items() if key in peer.state_dict()})
    assert set(peer.state_dict()) - {"num_batches_tracked"} == set(ours.state_dict()) - {"num_batches_tracked"}
    torch.testing.assert_close(run(ours, training), run(peer, training), **EXACT)
    state = {key: value for key, value in ours.state_dict().items() if key in peer.state_dict()}
    torch.testing.assert_close(state, dict(peer.state_dict()), **EXACT)


def test_a_group_norm_of_few_channels_has_one_per_group():
    norm = make_named_norm("GN", 8)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, make_named_norm("GN", C).num_groups) == (8, 32)


def test_the_layer_norm_is_convnexts():
    """detectron2's "LN" (main; 0.6 has none) is ConvNeXt's, which torchvision has with the same epsilon."""
    peer = pytest.importorskip("torchvision.models.convnext").LayerNorm2d(C, eps=1e-6).double()
    ours = randomize(make_named_norm("LN", C).double())
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(run(ours, True), run(peer, True), **EXACT)


def test_the_layer_norm_keeps_types_and_shapes():
    norm = make_named_norm("LN", C)
    for shape in ((2, C, 3, 4), (0, C, 3, 4), (2, C, 1, 1)):
        x = torch.randn(shape).requires_grad_()
        output = norm(x)
        assert output.shape == x.shape
        output.sum().backward()
    mean, std = norm(draw().float()).mean(1), norm(draw().float()).std(1, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-4)


def test_the_names_are_points_of_the_one_table():
    assert {
        "BN": NormSpec(),
        "SyncBN": NormSpec(workers="all"),
        "FrozenBN": NormSpec(frozen="both"),
    } == NAMED_NORMS
    for name, spec in NAMED_NORMS.items():
        norm = make_named_norm(name, C)
        assert isinstance(norm, BatchNorm2d)
        assert norm.spec == spec
    assert make_named_norm("", C) is None


@pytest.mark.parametrize("name", ["bn", "InstanceNorm", None, "naiveSyncBN"])
def test_another_name_is_refused_with_the_choices(name):
    with pytest.raises(ConfigError, match=r"must be one of 'BN', 'SyncBN', 'FrozenBN', 'GN', 'LN'.*; got"):
        make_named_norm(name, C)


def test_every_norm_is_told_its_path():
    model = nn.Sequential(nn.ModuleDict({"stem": BatchNorm2d(4)}), LevelBatchNorm2d(4, LEVELS), nn.BatchNorm2d(4))
    name_norms(model)
    assert (model[0]["stem"].path, model[1].path) == ("0.stem", "1")
    assert not hasattr(model[2], "path")

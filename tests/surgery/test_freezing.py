"""Freezing norms: statistics, affine or both, of bnext's norms and of torch's."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.surgery.freezing import freeze_norms, unfreeze_norms
from tests.workers import run_workers


class Other(nn.BatchNorm2d):
    """A batch norm of somebody else's."""


def make(norm):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)) + 3).square().mean().backward()
        optimizer.step()


def changes(model, steps=3):
    """Names of what a training changes."""
    before = copy.deepcopy(model.state_dict())
    train(model, steps)
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
AFFINE = {"1.weight", "1.bias"}
REST = {"0.weight", "0.bias", "3.weight", "3.bias"}
NORMS = {
    "torch": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "bnext": lambda: BatchNorm2d(4),
    "renorm": lambda: BatchNorm2d(4, NormSpec(training="renorm")),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("what", "trained"),
    [("both", REST), ("statistics", REST | AFFINE), ("affine", REST | STATISTICS)],
)
def test_what_is_frozen_stays_and_all_else_trains(name, what, trained):
    model = make(NORMS[name]())
    train(model, 1)
    assert freeze_norms(model, what) == ("1",)
    assert changes(model) == trained


def test_frozen_statistics_normalize_in_training():
    model = make(nn.BatchNorm2d(4))
    train(model)
    expected = copy.deepcopy(model).eval()
    freeze_norms(model, "statistics")
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model.train()(x), expected(x))


def test_torchs_norm_is_replaced_without_loss():
    model = torchvision.models.resnet18(num_classes=2)
    before = model.state_dict(keep_vars=True)
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model).eval()(x)
    paths = freeze_norms(model)
    assert len(paths) == 20
    assert model.bn1.spec.frozen == "both"
    assert model.bn1.path == "bn1"
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before), "the optimizer has these tensors"
    assert torch.equal(model(x), expected)


def test_a_norm_in_two_places_stays_one():
    norm = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    assert freeze_norms(model) == ("a.0",)
    assert isinstance(model["a"][0], BatchNorm2d)
    assert model["a"][0] is model["b"][0]


@pytest.mark.parametrize("name", NORMS)
def test_unfreezing_brings_back_the_training(name):
    model, same = make(NORMS[name]()), make(NORMS[name]())
    freeze_norms(model)
    train(model, 1)
    assert unfreeze_norms(model) == ("1",)
    same.load_state_dict(model.state_dict())
    train(model)
    train(same)
    for key, value in same.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_parts_add_up_and_come_off():
    model = make(nn.BatchNorm2d(4))
    assert freeze_norms(model, "statistics") == freeze_norms(model, "affine") == ("1",)
    assert model[1].spec.frozen == "both"
    assert freeze_norms(model) == ()
    assert unfreeze_norms(model, "statistics") == ("1",)
    assert model[1].spec.frozen == "affine"
    assert not model[1].weight.requires_grad


def test_levels_and_domains_are_frozen_with_their_norm():
    level = LevelBatchNorm2d(2, ("p3", "p4"), NormSpec.from_table5_row(6))
    domain = BatchNorm2d(2, NormSpec(affine="per_domain", population="per_domain", domains=("day", "night")))
    model = nn.ModuleList([level, domain])
    assert freeze_norms(model) == ("0", "1")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    level({"p3": torch.randn(2, 2, 3, 3)})
    assert level.p3.num_batches_tracked == 0


def test_only_selected_norms_are_frozen():
    model = nn.ModuleList([nn.BatchNorm2d(2), Other(2), nn.BatchNorm2d(2)])
    assert freeze_norms(model, select=lambda path, layer: path == "0") == ("0",)
    assert [type(norm) for norm in model] == [BatchNorm2d, Other, nn.BatchNorm2d]
    assert freeze_norms(model, "affine", select=lambda path, layer: isinstance(layer, Other)) == ("1",)
    assert unfreeze_norms(model, "affine") == ("0", "1")


def test_a_norm_without_affine_freezes_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2))
    assert freeze_norms(model) == ("0", "1")
    assert [norm.spec.frozen for norm in model] == ["statistics", "both"]


def with_hook():
    norm = nn.BatchNorm2d(2)
    norm.register_forward_hook(lambda *_: None)
    return nn.Sequential(norm)


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (nn.Sequential(nn.BatchNorm2d(2), Other(2)), r"Other \(1\)"),
        (nn.BatchNorm2d(2), "the model itself"),
        (with_hook(), r"hooks.*\(0\)"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), r"none \(0\)"),
        (nn.Sequential(BatchNorm2d(2, NormSpec(population="none", inference="mini_batch"))), r"none \(0\)"),
        (nn.GroupNorm(1, 2), "none"),
    ],
)
def test_what_cannot_be_frozen_is_refused_and_left_as_it_was(model, obstacle):
    before = [(type(module), getattr(module, "spec", None)) for module in model.modules()]
    with pytest.raises(ConfigError, match=obstacle):
        freeze_norms(model)
    assert [(type(module), getattr(module, "spec", None)) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="what"):
        freeze_norms(nn.BatchNorm2d(2), "all")


def freeze_in_ddp(rank):
    model = DistributedDataParallel(make(nn.BatchNorm2d(4)))
    try:
        freeze_norms(model)
    except ConfigError as error:
        message = str(error)
    freeze_norms(model, "statistics")
    trained = changes(model)
    return message, sorted(trained)


def test_the_affine_of_a_wrapped_model_is_refused_its_statistics_are_not():
    for message, trained in run_workers(freeze_in_ddp, 2):
        assert "FreezeNorms" in message
        assert {"module.1.weight", "module.1.bias"} <= set(trained)
        assert not any("running" in name for name in trained)


def test_a_frozen_affine_keeps_no_gradient_for_the_optimizer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    freeze_norms(model)
    before = model[1].bias.clone(), model[0].bias.clone()
    optimizer.step()
    assert torch.equal(model[1].bias, before[0])
    assert not torch.equal(model[0].bias, before[1])


def test_a_norm_without_eps_is_refused_by_its_path():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.0))
    with pytest.raises(ConfigError, match=r"eps 0\.0 \(1\)"):
        freeze_norms(model)

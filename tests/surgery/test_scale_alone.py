"""Norms with a scale and no bias, as torch's BatchNorm2d(bias=False), keep that through all changes."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnext.layers import BatchNorm2d, NormSpec
from bnext.scope import use_domain
from bnext.surgery import (
    check_norm_state,
    convert_norm,
    convert_norm_state,
    copy_norm_state,
    fold_norms,
    freeze_norms,
    unfreeze_norms,
)
from tests.cases import randomize

DOMAINS = ("day", "night")
SEPARATE = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
TARGETS = [NormSpec(), NormSpec(training="renorm"), SEPARATE, nn.BatchNorm2d, nn.SyncBatchNorm, "FrozenBN"]
IMAGES = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def make():
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("bias", None)
    return randomize(nn.Sequential(nn.Conv2d(3, 4, 1), norm)).eval()


def run(model, domains="night"):
    with use_domain(domains):
        return model(IMAGES)


@pytest.mark.parametrize("target", TARGETS)
def test_a_conversion_adds_no_bias(target):
    model = make()
    expected = run(model).detach()
    report = convert_norm(model, {"": target})
    assert report.keeps_outputs
    torch.testing.assert_close(run(model).detach(), expected)
    assert not [name for name, _ in model[1].named_parameters() if name.endswith("bias")]

    if target != nn.SyncBatchNorm:  # which trains on several workers alone
        for parameter in model.parameters():
            parameter.requires_grad_()
        run(model.train(), ("day", "night", "day", "night")).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_and_goes_back():
    model = make()
    state = copy.deepcopy(model.state_dict())
    convert_norm(model, {"": SEPARATE})
    convert_norm(model, {"": nn.BatchNorm2d})
    torch.testing.assert_close(model.state_dict(), state)


def test_a_norm_that_must_have_one_gets_zero():
    source, target = make()[1], randomize(BatchNorm2d(4))
    report = copy_norm_state(source, target)
    assert report.keeps_outputs
    assert target.bias.tolist() == [0, 0, 0, 0]

    report = copy_norm_state(randomize(BatchNorm2d(4)), source)
    assert not report.keeps_outputs

    model = make()
    convert_norm(model, {"": FrozenBatchNorm2d})
    torch.testing.assert_close(run(model), run(make()))


def test_freezing_and_unfreezing():
    model = make()
    expected = run(model).detach()
    freeze_norms(model)
    unfreeze_norms(model)
    assert isinstance(model[1], BatchNorm2d)
    assert [name for name, _ in model[1].named_parameters()] == ["weight"]
    torch.testing.assert_close(run(model).detach(), expected)


def test_folding():
    model = make()
    expected = run(model).detach()
    assert not fold_norms(model).left
    torch.testing.assert_close(run(model).detach(), expected)


def test_state_dicts_are_of_the_norms_own_form():
    model, others = make(), make()
    convert_norm(model, {"": SEPARATE})
    assert check_norm_state(model) == []

    converted, report = convert_norm_state(others.state_dict(), model)
    assert report.keeps_outputs
    model.load_state_dict(converted)
    model.load_state_dict(others.state_dict())  # the norm brings it into its form

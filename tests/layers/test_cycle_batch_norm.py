"""The norm of a head that goes through its levels one by one: as detectron2's class, and never out of step."""

import copy

import pytest
import torch
from detectron2.layers import CycleBatchNormList as Detectron2CycleBatchNormList
from torch import nn

from bnext import CycleBatchNormList, count_levels, frozen_statistics, use_domain, use_level
from bnext.errors import ConfigError, StatisticsError
from bnext.layers import LevelBatchNorm2d, NormSpec
from bnext.layers.counts import counts_of
from tests import cases

SIZES = ((8, 6), (4, 3), (2, 2))


class Head(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, features):
        return [self.norm(feature) for feature in features]


def make_heads(**options):
    """Ours and detectron2's, with the same random state."""
    torch.manual_seed(0)
    theirs = Detectron2CycleBatchNormList(3, num_features=5, **options).double()
    with torch.no_grad():
        for value in theirs.parameters():
            value.normal_()
    ours = CycleBatchNormList(3, num_features=5, **options).double()
    ours.load_state_dict(theirs.state_dict())
    heads = Head(ours), Head(theirs)
    count_levels(heads[0])
    return heads


def make_features(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, *size, generator=generator, dtype=torch.float64) * 3 + i for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": 0.3, "eps": 1e-3}, {"momentum": None}])
def test_it_is_detectron2s_where_that_is_in_step(options):
    ours, theirs = make_heads(**options)
    for seed in range(3):
        results = []
        for head in (ours, theirs):
            features = [feature.requires_grad_() for feature in make_features(seed)]
            outputs = head(features)
            sum(output.pow(3).sum() for output in outputs).backward()
            results.append([*outputs, *(feature.grad for feature in features), *(p.grad for p in head.parameters())])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)

    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for mine, other in zip(ours.eval()(make_features(9)), theirs.eval()(make_features(9)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_forward_that_breaks_off_shifts_theirs_and_not_ours():
    ours, theirs = make_heads()
    features = make_features(0)
    ours(features)
    theirs(features)
    expected = ours.eval()(features)
    theirs.eval()
    for head in (ours, theirs):
        with pytest.raises((AttributeError, StatisticsError)):
            head([features[0], None])
    assert all(torch.equal(*pair) for pair in zip(ours(features), expected, strict=True))
    assert not torch.allclose(theirs(features)[0], expected[0])


def test_levels_have_names_and_other_forms_load_them():
    norm = CycleBatchNormList(num_features=5, levels=("p3", "p4", "p5"))
    assert norm.levels == ("p3", "p4", "p5")
    numbered = make_heads()[0].norm.float()
    norm.load_state_dict(numbered.state_dict())
    together = LevelBatchNorm2d(5, norm.levels, NormSpec.from_table5_row(4))
    together.load_state_dict(norm.state_dict())
    features = dict(zip(norm.levels, [feature.float() for feature in make_features(1)], strict=True))
    expected = together.eval()(features)
    assert all(torch.equal(norm.eval()(features)[level], expected[level]) for level in features)
    for level, feature in features.items():
        with use_level(level):
            assert torch.equal(norm(feature), expected[level])
    numbered.load_state_dict(norm.state_dict())


def test_what_holds_statistics_still_does_so_here():
    ours, _ = make_heads()
    before = copy.deepcopy(ours.state_dict())
    with frozen_statistics(ours):
        ours(make_features(3))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_levels_one_after_another_of_several_domains_are_those_of_one_call():
    spec = cases.make_pairs("per_level_and_domain", "per_domain", "per_level_and_domain").spec
    one_by_one = CycleBatchNormList(levels=cases.LEVELS, num_features=cases.NUM_CHANNELS, spec=spec).double()
    together = LevelBatchNorm2d(cases.NUM_CHANNELS, cases.LEVELS, spec).double()
    with use_domain(cases.PAIRED):
        for level, feature in cases.make_features().items():
            with use_level(level):
                output = one_by_one(feature)
            torch.testing.assert_close(output, together({level: feature})[level])
    torch.testing.assert_close(dict(one_by_one.state_dict()), dict(together.state_dict()))
    assert counts_of(one_by_one).domains == {"night": 1, "day": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "length"),
        ({"length": 0}, "length"),
        ({"length": True}, "length"),
        ({"length": 2, "levels": ("p3",)}, "length"),
        ({"length": 2, "bn_class": nn.GroupNorm}, "bn_class"),
        ({"length": 2, "spec": NormSpec()}, "per_level"),
        ({"length": 2, "spec": "BN"}, "NormSpec"),
        ({"levels": ("p3", "p3")}, "levels"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CycleBatchNormList(num_features=4, **arguments)


def test_a_call_in_no_forward_is_refused():
    norm = CycleBatchNormList(2, num_features=5)
    with pytest.raises(StatisticsError, match="count_levels"):
        norm(torch.randn(2, 5, 4, 4))

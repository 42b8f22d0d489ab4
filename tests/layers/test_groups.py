"""Samples in groups: each group is a mini-batch of its own, in training and at inference, in every kind of norm."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnext.errors import StatisticsError
from bnext.layers import (
    BatchNorm2d,
    LevelBatchNorm2d,
    NormSpec,
    find_grouping_norms,
    use_groups,
    virtual_samples,
)
from bnext.scope import get_record, use_domain
from tests import reference
from tests.cases import CASES, LEVELS, NUM_CHANNELS, randomize
from tests.record import assert_nothing_is_open

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GROUPS, NUM_GROUPS = [2, 0, 2, 2, 0], 4  # of the five samples of a case; two groups are empty
# A norm over levels, or with a size of its own, has no groups.
FLAT_CASES = [
    parameter
    for parameter in CASES
    if not parameter.values[0].levels and parameter.values[0].spec.normalization_batch_size is None
]


def draw(num_samples=5, side=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, NUM_CHANNELS, side, side, generator=generator, dtype=torch.float64)
    return features * 2 + torch.arange(num_samples, dtype=torch.float64)[:, None, None, None]


def build(**answers):
    norm = randomize(BatchNorm2d(NUM_CHANNELS, NormSpec(**answers)).double())
    norm.path = "roi_heads.box_head.conv1.norm"
    return norm


def expect(case, norm, features, training):
    """By the definition: a mini-batch is what was one, and of one group."""
    spec, domains = case.spec, case.domains_of({"x": features})
    own = case.mini_batches_of({"x": features}, training)
    affines = [(norm.affine_state(d).weight, norm.affine_state(d).bias) for d in domains]
    states = [norm.population_state(d) for d in domains]
    by = spec.training if training else spec.inference
    outputs = reference.normalize_samples(
        list(features),
        list(zip(own, GROUPS, strict=True)),
        affines if spec.affine != "none" else [None] * len(domains),
        [(s.running_mean.clone(), s.running_var.clone()) if spec.population != "none" else None for s in states],
        "population" if training and spec.has_frozen_statistics else by,
        r_max=spec.r_max,
        d_max=spec.d_max,
    )
    return torch.stack(outputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FLAT_CASES)
def test_every_kind_of_norm_normalizes_each_group_by_itself(case, training):
    norm, twin = case.build().train(training), case.build().train(training)
    features, factors = case.inputs(requires_grad=True)["x"], case.inputs(seed=9)["x"]
    expected = expect(case, norm, features, training)
    right = torch.autograd.grad(expected, [features, *case.used_parameters(norm)], factors)
    with use_groups(norm, GROUPS, NUM_GROUPS):
        output = case.call(norm, {"x": features})["x"]
    torch.testing.assert_close(output, expected, **EXACT)
    actual = torch.autograd.grad(output, [features, *case.used_parameters(norm)], factors)
    torch.testing.assert_close(actual, right, **EXACT)
    case.call(twin, {"x": features})
    # The running statistics are those of the whole call without groups.
    torch.testing.assert_close(dict(norm.state_dict()), dict(twin.state_dict()), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_rois_of_each_image_are_normalized_by_torchs_kernel_as_alone(dtype, channels_last):
    norm = build(inference="mini_batch").eval().to(torch.float64 if dtype == torch.float64 else torch.float32)
    features = draw(9, 4).to(dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    images = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, 3])
    with use_groups(norm, images, 4):
        output = norm(features)
    assert output.dtype == dtype
    assert output.stride() == features.stride()
    rough = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    for image in (0, 2, 3):
        own = features[images == image].to(norm.weight.dtype)
        alone = F.batch_norm(own, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        torch.testing.assert_close(output[images == image].to(alone.dtype), alone, **rough)


def test_groups_of_virtual_samples_each_hold_them_and_the_population_once():
    """Empty groups are the last ones here."""
    norm, twin = build().train(), build().train()
    extra = draw(4, seed=5)
    with virtual_samples(norm, extra), use_groups(norm, [1, 0, 1, 1, 0], 3):
        output = norm(draw())
    for group in (0, 1):
        own = draw()[torch.tensor([1, 0, 1, 1, 0]) == group]
        right = reference.concatenated_batch_norm([own, extra], [norm.weight] * 2, [norm.bias] * 2, norm.eps)[0]
        torch.testing.assert_close(output[torch.tensor([1, 0, 1, 1, 0]) == group], right, **EXACT)
    with virtual_samples(twin, extra):
        twin(draw())
    torch.testing.assert_close(dict(norm.state_dict()), dict(twin.state_dict()), **EXACT)


def test_virtual_samples_count_for_the_population_whichever_group_is_empty():
    norm, twin = build().train(), build().train()
    with virtual_samples(norm, draw(4, seed=5)), use_groups(norm, GROUPS, NUM_GROUPS):
        norm(draw())
    moved = build().train()
    with virtual_samples(moved, draw(4, seed=5)), use_groups(moved, [3, 1, 3, 3, 1], NUM_GROUPS):
        moved(draw())
    with virtual_samples(twin, draw(4, seed=5)):
        twin(draw())
    torch.testing.assert_close(dict(norm.state_dict()), dict(twin.state_dict()), **EXACT)
    torch.testing.assert_close(dict(moved.state_dict()), dict(twin.state_dict()), **EXACT)


def test_no_samples_in_groups():
    for training in (True, False):
        norm = build(inference="mini_batch").train(training)
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        with use_groups(norm, [], 3):
            features = draw(0).requires_grad_()
            norm(features).sum().backward()
        assert features.grad.shape == features.shape
        assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_a_group_of_a_single_element():
    norm = build().train()
    features = draw(3, side=1)
    with use_groups(norm, [0, 0, 1], 2), pytest.raises(StatisticsError, match=r"more than 1 element .*conv1\.norm"):
        norm(features)
    norm = build(single_element="population").train()
    population = [norm.running_mean.clone(), norm.running_var.clone()]
    with use_groups(norm, [0, 0, 1], 2):
        output = norm(features)
    torch.testing.assert_close(
        output[2:], reference.inference_norm(features[2:], *population, norm.weight, norm.bias, norm.eps), **EXACT
    )
    pair = F.batch_norm(features[:2], None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    torch.testing.assert_close(output[:2], pair, **EXACT)


def test_norms_by_population_take_no_notice():
    norm = build().eval()
    with use_groups(norm, GROUPS, NUM_GROUPS):
        assert torch.equal(norm(draw()), norm.eval()(draw()))


# ---- the scope


def test_scopes_nest_and_end_also_by_an_exception():
    norm = build(inference="mini_batch").eval()
    with use_groups(norm, [0, 1], 2):
        with use_groups(norm, torch.tensor([0, 1, 2]), 3):
            assert get_record().groups[norm].num_groups == 3
        with pytest.raises(StatisticsError), use_groups(norm, [0], 1):
            norm(draw())
        assert get_record().groups[norm].numbers.tolist() == [0, 1]
    assert_nothing_is_open()


def test_only_the_norms_of_the_module_are_told():
    model = nn.Sequential(build(), nn.Sequential(build(), nn.ReLU()))
    with use_groups(model[1], [0, 0], 1):
        assert list(get_record().groups) == [model[1][0]]


def test_groups_of_another_batch_are_refused():
    norm = build(inference="mini_batch").train()
    with (
        use_groups(norm, [0, 1], 2),
        pytest.raises(StatisticsError, match=r"one group per sample .*got 2 for \(5,\) samples \(roi_heads\.box"),
    ):
        norm(draw())
    norm(draw())


def test_a_size_of_its_own_and_groups_exclude_one_another():
    norm = build(normalization_batch_size=2).train()
    with use_groups(norm, GROUPS, NUM_GROUPS), pytest.raises(StatisticsError, match=r"must be None .*got 2 \(roi_he"):
        norm(draw())


def test_copies_within_a_scope_know_nothing_of_it():
    norm = build().train()
    with use_groups(norm, GROUPS, NUM_GROUPS):
        twins = [copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))]
        grouped = norm(draw())
        for twin in twins:
            assert not torch.equal(twin(draw()), grouped)
    for twin in twins:
        assert torch.equal(twin(draw()), norm(draw()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activations_are_computed_again_with_their_groups(use_reentrant):
    gradients, states = [], []
    for again in (False, True):
        norm = build().train()
        features = draw().requires_grad_()
        with use_groups(norm, GROUPS, NUM_GROUPS):
            output = checkpoint(norm, features, use_reentrant=use_reentrant) if again else norm(features)
            output.pow(3).sum().backward()
        gradients.append([features.grad, norm.weight.grad])
        states.append(dict(norm.state_dict()))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 3), build(), nn.ReLU()).float().train()
    twin = copy.deepcopy(model)
    features = draw(5, 6).float()
    with torch.autocast("cpu", dtype), use_groups(model, GROUPS, NUM_GROUPS):
        output = model(features)
    output.float().pow(2).mean().backward()
    with use_groups(twin, GROUPS, NUM_GROUPS):
        expected = twin(features)
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_domains_and_groups_of_a_mixed_batch():
    """A mini-batch is of one domain and one group; an idle domain moves nothing."""
    own = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
    norm = build(domains=("day", "night", "fog"), **own).train()
    before = norm.fog.running_mean.clone()
    features, domains = draw(6), ("day", "night", "day", "night", "night", "day")
    with use_domain(domains), use_groups(norm, [0, 0, 1, 1, 0, 1], 2):
        output = norm(features)
    for index in ([0], [1, 4], [2, 5], [3]):
        state = norm.affine_state(domains[index[0]])
        alone = F.batch_norm(features[index], None, None, state.weight, state.bias, True, 0.0, norm.eps)
        torch.testing.assert_close(output[index], alone, **EXACT)
    assert torch.equal(norm.fog.running_mean, before)


# ---- what it refuses


@pytest.mark.parametrize(
    ("groups", "num_groups", "text"),
    [
        ([0, 2], 2, r"groups must be one whole number per sample, 0 to 1; got 2 \(use_groups\)\. Number the groups"),
        ([0, -1], 2, r"0 to 1; got -1 \(use_groups\)"),
        (torch.tensor([0, 7]), 2, r"0 to 1; got 7 \(use_groups\)"),
        (torch.zeros(2, 2, dtype=torch.long), 2, r"got the shape \[2, 2\]"),
        ([[0, 1], [1, 0]], 2, r"got the shape \[2, 2\]"),
        ([[0], [1, 0]], 2, r"got \[\[0\], \[1, 0\]\]"),
        ([0.0, 0.5], 2, r"got \[0\.0, 0\.5\]"),
        ([True, False], 2, r"got \[True, False\]"),
        (["a", "b"], 2, r"got \['a', 'b'\]"),
        (3, 2, r"got 3 \(use_groups\)"),
        (None, 2, r"got None \(use_groups\)"),
        ([0, 0], 0, r"num_groups must be 1 or more; got 0 \(use_groups\)\. Say how many groups there are"),
        ([], 0, r"num_groups must be 1 or more; got 0"),
        ([0, 0], -1, r"num_groups must be 1 or more; got -1"),
        ([0, 0], True, r"num_groups must be 1 or more; got True"),
        ([0, 0], 2.0, r"num_groups must be 1 or more; got 2\.0"),
        ([0, 0], "2", r"num_groups must be 1 or more; got '2'"),
    ],
)
def test_groups_that_are_none(groups, num_groups, text):
    norm = build()
    with pytest.raises(StatisticsError, match=text), use_groups(norm, groups, num_groups):
        pass
    assert_nothing_is_open()


@pytest.mark.parametrize("form", ["too few", "too many"])
def test_as_many_groups_as_samples(form):
    norm = build().train()
    groups = [0, 1, 0] if form == "too few" else [0, 1] * 3
    with (
        use_groups(norm, groups, 2),
        pytest.raises(StatisticsError, match=rf"got {len(groups)} for \(5,\) samples \(roi_heads.box_head.conv1.norm"),
    ):
        norm(draw())


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Sequential(nn.ReLU()), r"got none \(Sequential\)\. Convert its norms with convert_norm"),
        (nn.BatchNorm2d(3), r"got none \(BatchNorm2d\)"),
        (nn.Sequential(BatchNorm2d(3), LevelBatchNorm2d(3, LEVELS)), r"one over the levels \('p3', 'p4', 'p5'\)"),
    ],
)
def test_a_module_without_norms_that_know_groups(module, text):
    with pytest.raises(StatisticsError, match=text):
        find_grouping_norms(module)

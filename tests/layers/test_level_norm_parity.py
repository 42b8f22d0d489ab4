"""Every row in float64: outputs, gradients of features, weight and bias, and buffers, against other people's BN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bnext.layers import LevelBatchNorm2d, NormSpec
from tests import reference, strategies
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, SPECS, make_features, make_norm, randomize

EXACT = {"rtol": 1e-11, "atol": 1e-11}
STEPS = 3


def run_steps(norm, parameters, forward, training=True):
    """Outputs, input gradients and parameter gradients of a few training steps with fixed loss gradients."""
    norm.train(training)
    parameters = list(parameters)
    results = []
    for step in range(STEPS):
        features = make_features(seed=step, requires_grad=True)
        outputs = forward(features)
        grads = [x.detach() for x in make_features(seed=100 + step).values()]
        wanted = [*features.values(), *parameters]
        results.append((list(outputs.values()), torch.autograd.grad(list(outputs.values()), wanted, grads)))
    return results


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **EXACT)


def plain_bn():
    return randomize(nn.BatchNorm2d(NUM_CHANNELS).double())


def row(number, **changes):
    return make_norm(NormSpec.from_table5_row(number).replace(**changes))


def test_row_1_is_batch_norm_on_the_concatenation_of_all_levels():
    norm, bn = row(1), plain_bn()

    def concatenate(features):
        # One image of one row per level would do as well: a batch norm sees a bag of elements per channel.
        flat = torch.cat([x.transpose(0, 1).reshape(NUM_CHANNELS, -1) for x in features.values()], dim=1)
        parts = bn(flat[None, :, :, None])[0, :, :, 0].split([x[:, 0].numel() for x in features.values()], dim=1)
        shapes = [x.transpose(0, 1).shape for x in features.values()]
        return {
            level: part.reshape(shape).transpose(0, 1)
            for level, part, shape in zip(features, parts, shapes, strict=True)
        }

    expected = run_steps(bn, bn.parameters(), concatenate)
    assert_same(run_steps(norm, [norm.weight, norm.bias], norm), expected)
    assert_same(dict(norm.state_dict()), dict(bn.state_dict()))


def test_row_3_is_one_batch_norm_called_level_after_level():
    norm, bn = row(3), plain_bn()
    expected = run_steps(bn, bn.parameters(), lambda xs: {level: bn(x) for level, x in xs.items()})
    assert_same(run_steps(norm, [norm.weight, norm.bias], norm), expected)
    assert_same(dict(norm.state_dict()), dict(bn.state_dict()))


def test_row_4_is_the_cycling_head_of_detectron2_called_rightly():
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    norm = row(4)
    peer = cycling(len(LEVELS), bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS).double()
    names = {f"{i}.": f"{level}." for i, level in enumerate(LEVELS)}
    renamed = {key: names.get(key[:2], key[:2]) + key[2:] for key in peer.state_dict()}
    peer.load_state_dict({key: norm.state_dict()[ours] for key, ours in renamed.items()})
    expected = run_steps(peer, [peer.weight, peer.bias], lambda xs: {level: peer(x) for level, x in xs.items()})
    assert_same(run_steps(norm, [norm.weight, norm.bias], norm), expected)
    assert_same({key: norm.state_dict()[ours] for key, ours in renamed.items()}, dict(peer.state_dict()))
    evaluated = run_steps(peer, [peer.weight], lambda xs: {level: peer(x) for level, x in xs.items()}, training=False)
    assert_same(run_steps(norm, [norm.weight], norm, training=False), evaluated)


def test_row_6_is_one_batch_norm_per_level():
    norm, bns = row(6), nn.ModuleDict({level: plain_bn() for level in LEVELS})
    norm.load_state_dict(bns.state_dict())
    expected = run_steps(bns, bns.parameters(), lambda xs: {level: bns[level](x) for level, x in xs.items()})
    assert_same(run_steps(norm, norm.parameters(), norm), expected)
    assert_same(dict(norm.state_dict()), dict(bns.state_dict()))


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_is_the_float64_definition(spec):
    norm = make_norm(spec).train()
    answers = (spec.statistics, spec.population, spec.affine)
    for step in range(STEPS):
        features = make_features(seed=step, requires_grad=True)
        affine = [norm.affine_state(level) for level in LEVELS]
        populations = [norm.population_state(level) for level in LEVELS]
        outputs, means, variances = reference.table5_forward(
            answers,
            features,
            {level: state.weight for level, state in zip(LEVELS, affine, strict=True)},
            {level: state.bias for level, state in zip(LEVELS, affine, strict=True)},
            {level: state.running_mean.clone() for level, state in zip(LEVELS, populations, strict=True)},
            {level: state.running_var.clone() for level, state in zip(LEVELS, populations, strict=True)},
        )
        wanted = [*features.values(), *norm.parameters()]
        grads = list(make_features(seed=100 + step).values())
        expected = torch.autograd.grad(list(outputs.values()), wanted, grads)
        actual = norm(features)
        assert_same(actual, outputs)
        assert_same(torch.autograd.grad(list(actual.values()), wanted, grads), expected)
        assert_same({level: norm.population_state(level).running_mean for level in LEVELS}, means)
        assert_same({level: norm.population_state(level).running_var for level in LEVELS}, variances)
    updates = STEPS if spec.population == "per_level" or spec.statistics == "shared" else STEPS * len(LEVELS)
    counters = {int(norm.population_state(level).num_batches_tracked) for level in LEVELS}
    assert counters == {7 + updates}


@pytest.mark.parametrize("spec", SPECS)
def test_eval_is_torchs_batch_norm_by_the_levels_own_state(spec):
    spec = spec.replace(eps=0.3)
    norm = make_norm(spec).eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    features = make_features(requires_grad=True)
    outputs = norm(features)
    for level, feature in features.items():
        population, affine = norm.population_state(level), norm.affine_state(level)
        state = (population.running_mean, population.running_var, affine.weight, affine.bias)
        assert_same(outputs[level], F.batch_norm(feature, *state, False, 0.0, spec.eps))
        assert_same(outputs[level], reference.inference_norm(feature, *state, spec.eps))
    torch.autograd.grad(list(outputs.values()), [*features.values(), *norm.parameters()], list(features.values()))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@given(strategies.seeds, st.sampled_from(ROWS))
@settings(max_examples=25, deadline=None)
def test_one_level_is_a_plain_batch_norm_in_every_row(seed, number):
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, ["p3"], NormSpec.from_table5_row(number)).double()).train()
    bn = plain_bn()
    bn.load_state_dict({key.removeprefix("p3."): value for key, value in norm.state_dict().items()})
    feature = make_features(seed)["p3"]
    assert_same(norm({"p3": feature})["p3"], bn(feature))
    assert_same({key.removeprefix("p3."): v for key, v in norm.state_dict().items()}, dict(bn.state_dict()))


@given(strategies.seeds, st.permutations(LEVELS), st.sampled_from(ROWS))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_mapping_is_irrelevant(seed, order, number):
    norm, same = row(number).train(), row(number).train()
    features = make_features(seed)
    outputs = norm({level: features[level] for level in order})
    assert list(outputs) == list(order)
    expected = same(features)
    assert all(torch.equal(outputs[level], expected[level]) for level in LEVELS)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in norm.state_dict().items())

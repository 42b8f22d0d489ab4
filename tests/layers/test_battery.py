"""What every norm must stand, whatever it computes: all specs of cases.py, one property after another."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext.layers import LevelBatchNorm2d
from tests.cases import LEVELS, NUM_CHANNELS, SPECS, make_features, make_norm

pytestmark = pytest.mark.parametrize("spec", SPECS)


def state_of(norm):
    return {key: value.clone() for key, value in norm.state_dict().items()}


def assert_equal_state(norm, state):
    assert norm.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())


def assert_equal_outputs(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[level], expected[level]) for level in actual)


def step(norm, features):
    """Outputs and gradients of one training step."""
    features = {level: feature.detach().clone().requires_grad_() for level, feature in features.items()}
    outputs = norm(features)
    sum(output.float().pow(3).sum() for output in outputs.values()).backward()
    return outputs, [x.grad for x in features.values()] + [p.grad for p in norm.parameters()]


def test_state_dict_round_trip_is_strict_and_exact(spec):
    norm, other = make_norm(spec, seed=1), make_norm(spec, seed=2)
    other.load_state_dict(norm.state_dict(), strict=True)
    for training in (False, True):
        assert_equal_outputs(norm.train(training)(make_features()), other.train(training)(make_features()))
    assert_equal_state(other, norm.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_are_equal_and_independent(spec, duplicate):
    norm = make_norm(spec).train()
    twin = duplicate(norm)
    assert (twin.spec, twin.levels, twin.path) == (norm.spec, norm.levels, norm.path)
    assert_equal_state(twin, norm.state_dict())
    before = state_of(norm)
    step(twin, make_features())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal_state(norm, before)


@pytest.mark.parametrize("training", [True, False])
def test_train_moves_buffers_and_eval_does_not(spec, training):
    norm = make_norm(spec).train(training)
    assert all(module.training == training for module in norm.modules())
    before = dict(norm.named_buffers())
    before = {name: buffer.clone() for name, buffer in before.items()}
    norm(make_features())
    assert all(torch.equal(buffer, before[name]) != training for name, buffer in norm.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_with_float32_state(spec, dtype, training):
    norm, wide = (make_norm(spec, torch.float32).train(training) for _ in range(2))
    features = make_features(dtype=dtype)
    outputs, gradients = step(norm, features)
    expected, expected_gradients = step(wide, {level: feature.float() for level, feature in features.items()})
    assert {output.dtype for output in outputs.values()} == {dtype}
    digit = 4 * torch.finfo(dtype).eps
    for level in LEVELS:
        torch.testing.assert_close(outputs[level].float(), expected[level], rtol=digit, atol=digit)
    # The loss' gradient is rounded with the outputs, by a digit of its largest values.
    for actual, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.float(), right, rtol=0, atol=float(8 * digit * right.abs().max() + digit))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, wide.state_dict()[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_is_half_itself(spec, dtype, training):
    norm = make_norm(spec, torch.float32).to(dtype).train(training)
    outputs, gradients = step(norm, make_features(dtype=dtype))
    assert {tensor.dtype for tensor in [*outputs.values(), *gradients]} == {dtype}
    assert all(torch.isfinite(tensor).all() for tensor in [*outputs.values(), *gradients, *norm.buffers()])
    expected = make_norm(spec, torch.float32).train(training)(make_features(dtype=torch.float32))
    for level in LEVELS:
        torch.testing.assert_close(outputs[level].float(), expected[level], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_after_a_convolution(spec, training):
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1)
    norm = make_norm(spec, torch.float32).train(training)
    features = make_features(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = {level: conv(feature) for level, feature in features.items()}
        outputs = norm(half)
        loss = sum(output.float().square().mean() for output in outputs.values())
    loss.backward()
    assert {x.dtype for x in half.values()} == {output.dtype for output in outputs.values()} == {torch.bfloat16}
    assert {parameter.grad.dtype for parameter in [*norm.parameters(), *conv.parameters()]} == {torch.float32}
    expected = make_norm(spec, torch.float32).train(training)({k: x.detach().float() for k, x in half.items()})
    for level in LEVELS:
        torch.testing.assert_close(outputs[level].float(), expected[level], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_stays_channels_last(spec, training):
    norm = make_norm(spec).train(training)
    features = {k: x.contiguous(memory_format=torch.channels_last) for k, x in make_features().items()}
    features = {level: feature.requires_grad_() for level, feature in features.items()}
    outputs = norm(features)
    for level, output in outputs.items():
        assert output.stride() == features[level].stride()
    grads = [torch.randn_like(output) for output in outputs.values()]
    for gradient, feature in zip(
        torch.autograd.grad(list(outputs.values()), list(features.values()), grads), features.values(), strict=True
    ):
        assert gradient.stride() == feature.stride()
    expected = make_norm(spec).train(training)(make_features())
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_never_changed_in_place(spec, training):
    norm = make_norm(spec).train(training)
    features = make_features()
    before = {level: feature.clone() for level, feature in features.items()}
    outputs = norm(features)
    assert all(torch.equal(features[level], before[level]) for level in LEVELS)
    assert list(features) == list(LEVELS)
    assert all(outputs[level].data_ptr() != features[level].data_ptr() for level in LEVELS)


def test_a_later_in_place_relu_is_allowed(spec):
    norm, plain = make_norm(spec).train(), make_norm(spec).train()
    gradients = []
    for layer, relu in ((norm, torch.relu_), (plain, torch.relu)):
        features = make_features(requires_grad=True)
        sum(relu(output).square().sum() for output in layer(features).values()).backward()
        gradients.append([feature.grad for feature in features.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_gives_the_same_outputs_and_gradients(spec, training):
    # How the running statistics take the recomputation is not stated here.
    norm, plain = make_norm(spec).train(training), make_norm(spec).train(training)
    expected = step(plain, make_features())
    features = make_features(requires_grad=True)
    outputs = checkpoint(norm, features, use_reentrant=False)
    sum(output.float().pow(3).sum() for output in outputs.values()).backward()
    gradients = [x.grad for x in features.values()] + [p.grad for p in norm.parameters()]
    assert_equal_outputs(outputs, expected[0])
    torch.testing.assert_close(gradients, expected[1], rtol=0, atol=0)


def test_twice_in_one_graph(spec):
    norm = make_norm(spec).train()
    outputs = norm(norm(make_features()))
    sum(output.square().sum() for output in outputs.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in norm.parameters())


def test_every_affine_is_a_norms_for_the_optimizer(spec):
    get_params = pytest.importorskip("detectron2.solver.build").get_default_optimizer_params
    model = nn.Sequential(nn.Conv2d(3, NUM_CHANNELS, 1), make_norm(spec))
    groups = get_params(model, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0)
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {
        **dict.fromkeys(model[0].parameters(), 0.0001),
        **dict.fromkeys(model[1].parameters(), 0.0),
    }


def test_without_gradient_nothing_is_recorded(spec):
    norm = make_norm(spec).train()
    with torch.no_grad():
        outputs = norm(make_features())
    assert not any(output.requires_grad for output in outputs.values())
    norm.requires_grad_(False)
    assert not any(output.requires_grad for output in norm(make_features()).values())


def test_moves_to_another_type_as_a_whole(spec):
    norm = make_norm(spec, torch.float32).double()
    floats = [tensor for tensor in norm.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float64}
    meta = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).to("meta")
    assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}


def test_warns_of_nothing(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(make_norm(spec).train(), make_features())
        make_norm(spec).eval()(make_features())

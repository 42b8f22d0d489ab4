"""`normalize_parts` against the concatenation in float64: value, gradient, memory format, inputs left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnext.functional import group_moments, normalize_parts, part_moments
from tests import reference, strategies

EPS = 1e-5
CHANNELS = 3


def make_inputs(seed, sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, CHANNELS, h, w) for n, h, w in sizes]
    features = [torch.randn(s, generator=generator, dtype=dtype) * (i + 1) + i for i, s in enumerate(shapes)]
    weight = torch.rand(len(sizes), CHANNELS, generator=generator, dtype=dtype) + 0.5
    bias = torch.randn(len(sizes), CHANNELS, generator=generator, dtype=dtype)
    return [*features, weight, bias], [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def normalize_levels(features, weight, bias, mini_batches):
    """Each feature a part; what a layer does, without its state."""
    parts, owners = range(len(features)), torch.tensor(tuple(mini_batches))
    with torch.no_grad():
        batches = group_moments(part_moments(features, parts, len(features)), owners, max(mini_batches) + 1)
    return normalize_parts(features, parts, weight, bias, EPS, batches, owners)


def value_and_gradients(function, inputs, grad_outputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = function(inputs[:-2], inputs[-2], inputs[-1])
    return outputs, torch.autograd.grad(outputs, inputs, grad_outputs)


def normalized_by(mini_batches):
    return lambda features, weight, bias: normalize_levels(features, weight, bias, mini_batches)


def reference_outputs(features, weight, bias, mini_batches):
    outputs = [None] * len(features)
    for mini_batch in set(mini_batches):
        members = [i for i, owner in enumerate(mini_batches) if owner == mini_batch]
        parts = [[source[i] for i in members] for source in (features, weight, bias)]
        for index, output in zip(members, reference.concatenated_batch_norm(*parts, EPS), strict=True):
            outputs[index] = output
    return outputs


@given(strategies.seeds, strategies.level_sizes(), st.data())
@settings(max_examples=40, deadline=None)
def test_any_assignment_to_mini_batches_is_the_reference(seed, sizes, data):
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    inputs, grads = make_inputs(seed, sizes)
    actual = value_and_gradients(normalized_by(owners), inputs, grads)
    expected = value_and_gradients(lambda x, w, b: reference_outputs(x, w, b, owners), inputs, grads)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_samples_of_a_feature_may_be_of_different_parts(memory_format):
    """Parts 0 and 2 are one mini-batch, part 1 another; the samples one by one are the reference's features."""
    inputs, grads = make_inputs(0, [(4, 3, 2), (2, 2, 2), (0, 1, 1)])
    inputs[:3] = [feature.contiguous(memory_format=memory_format) for feature in inputs[:3]]
    parts, owners = [torch.tensor([0, 1, 0, 2]), 1, 2], torch.tensor([0, 1, 0])

    def normalize(features, weight, bias):
        with torch.no_grad():
            statistics = group_moments(part_moments(features, parts, 3), owners, 2)
        return normalize_parts(features, parts, weight, bias, EPS, statistics, owners)

    def define(features, weight, bias):
        index = torch.tensor([0, 1, 0, 2, 1, 1])
        samples = [*features[0].split(1), *features[1].split(1)]
        outputs = reference_outputs(samples, weight[index], bias[index], owners[index].tolist())
        return [torch.cat(outputs[:4]), torch.cat(outputs[4:]), features[2]]

    actual, expected = (value_and_gradients(function, inputs, grads) for function in (normalize, define))
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mini_batches", [(0, 0, 0), (0, 1, 2), (0, 1, 0)])
def test_gradcheck(mini_batches):
    inputs, _ = make_inputs(0, [(2, 2, 2), (2, 1, 2), (1, 1, 3)])
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(
        lambda *args: tuple(normalize_levels(args[:-2], args[-2], args[-1], mini_batches)), inputs
    )


def test_an_empty_level_changes_nothing_for_the_others():
    inputs, grads = make_inputs(0, [(2, 3, 2), (0, 4, 4), (2, 2, 2)])
    outputs, gradients = value_and_gradients(normalized_by([0, 0, 0]), inputs, grads)
    inputs, grads = [inputs[0], inputs[2], inputs[3][[0, 2]], inputs[4][[0, 2]]], [grads[0], grads[2]]
    alone, alone_gradients = value_and_gradients(normalized_by([0, 0]), inputs, grads)
    assert outputs[1].shape == gradients[1].shape == (0, CHANNELS, 4, 4)
    torch.testing.assert_close([outputs[0], outputs[2]], alone, rtol=0, atol=1e-14)
    torch.testing.assert_close([gradients[0], gradients[2]], list(alone_gradients[:2]), rtol=0, atol=1e-14)
    assert torch.equal(gradients[3][1], torch.zeros(CHANNELS).double())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("target", [0, 2, 3])
def test_second_derivative_is_refused_also_where_the_loss_is_linear(power, target):
    inputs, grads = make_inputs(0, [(2, 3, 2), (2, 2, 2)])
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = normalize_levels(inputs[:-2], inputs[-2], inputs[-1], [0, 0])
    loss = sum((output.pow(power) * grad).sum() for output, grad in zip(outputs, grads, strict=True))
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="normalize_parts"):
        gradients[target].square().sum().backward()


def test_create_graph_does_not_change_first_derivatives():
    inputs, grads = make_inputs(0, [(2, 3, 2), (2, 2, 2)])
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = normalize_levels(inputs[:-2], inputs[-2], inputs[-1], [0, 0])
    plain = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    with_graph = torch.autograd.grad(outputs, inputs, grads, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_graph, strict=True))


def test_only_one_level_is_used_by_the_loss():
    inputs, grads = make_inputs(0, [(2, 3, 2), (2, 2, 2)])

    def first_of(function):
        copies = [tensor.clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(copies[:2], copies[2], copies[3])[0], copies, grads[0])

    actual = first_of(normalized_by([0, 0]))
    expected = first_of(lambda x, w, b: reference_outputs(x, w, b, [0, 0]))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_only_the_rounding_of_inputs_and_outputs(dtype):
    inputs, grads = make_inputs(0, [(2, 9, 8), (2, 3, 4)], dtype=torch.float32)
    inputs = [tensor.to(dtype).float() for tensor in inputs[:2]] + inputs[2:]
    grads = [grad.to(dtype).float() for grad in grads]
    expected, expected_gradients = value_and_gradients(normalized_by([0, 0]), inputs, grads)
    actual, gradients = value_and_gradients(
        lambda x, w, b: normalize_levels([t.to(dtype) for t in x], w, b, [0, 0]),
        inputs,
        [grad.to(dtype) for grad in grads],
    )
    assert {output.dtype for output in actual} == {dtype}
    one_digit = 1.01 * torch.finfo(dtype).eps
    for a, e in zip(actual + list(gradients[:2]), expected + list(expected_gradients[:2]), strict=True):
        torch.testing.assert_close(a.float(), e.to(dtype).float(), rtol=one_digit, atol=1e-5)
    torch.testing.assert_close(gradients[2:], expected_gradients[2:], rtol=1e-5, atol=1e-5)


def test_large_mean_in_float32():
    features = [torch.randn(2, CHANNELS, s, s, generator=torch.Generator().manual_seed(s)) + 1e4 for s in (32, 16)]
    weight, bias = torch.ones(2, CHANNELS), torch.zeros(2, CHANNELS)
    outputs = normalize_levels(features, weight, bias, [0, 0])
    expected = reference.concatenated_batch_norm(
        [x.double() for x in features], list(weight.double()), list(bias.double()), EPS
    )
    for actual, right in zip(outputs, expected, strict=True):
        # 1e4 has no digits below 1e-3 in float32: that much of a standard deviation is in the data's rounding.
        torch.testing.assert_close(actual.double(), right, rtol=0, atol=2e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept_forward_and_backward_and_inputs_are_not_changed(memory_format):
    inputs, grads = make_inputs(0, [(2, 4, 5), (2, 2, 3)])
    features = [x.contiguous(memory_format=memory_format).requires_grad_() for x in inputs[:2]]
    grads = [grad.contiguous(memory_format=memory_format) for grad in grads]
    before = [tensor.detach().clone() for tensor in [*features, *inputs[2:], *grads]]
    outputs = normalize_levels(features, inputs[2], inputs[3], [0, 0])
    gradients = torch.autograd.grad(outputs, features, grads)
    for tensor in [*outputs, *gradients]:
        assert tensor.is_contiguous(memory_format=memory_format)
    after = [tensor.detach() for tensor in [*features, *inputs[2:], *grads]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

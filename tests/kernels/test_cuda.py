"""CUDA's passes with numbers, by a Python form of torch's kernels: whole norms, and gradients whose scale is 0."""

import pytest
import torch

from bnext import kernels
from bnext.kernels import formula
from bnext.kernels.one_by_one import OneByOne
from tests.cases import CASES, pick_cases
from tests.kernels.cuda_operators import registered

LAYOUTS = [torch.contiguous_format, torch.channels_last]
BY_FORMULA = OneByOne(formula)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def cuda():
    with registered():
        yield kernels._BY_DEVICE["cuda"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(case, layout):
    """Outputs, gradients and buffers."""
    norm = case.build()
    inputs = {name: x.contiguous(memory_format=layout).requires_grad_() for name, x in case.inputs().items()}
    outputs = case.call(norm, inputs)
    sum((output**3).sum() for output in outputs.values()).backward()
    gradients = [tensor.grad for tensor in [*inputs.values(), *norm.parameters()] if tensor.grad is not None]
    return [*outputs.values(), *gradients, *norm.buffers()]


@pytest.mark.parametrize("case", CASES)
def test_a_norm_by_cudas_passes_is_the_same_norm(case, cuda, monkeypatch):
    assert_is_the_same(case, torch.contiguous_format, cuda, monkeypatch)


@pytest.mark.parametrize("case", pick_cases("ghost2", "domains-mixed", "levels-row1", "levels-row6", "pairs"))
def test_a_norm_in_channels_last(case, cuda, monkeypatch):
    assert_is_the_same(case, torch.channels_last, cuda, monkeypatch)


def assert_is_the_same(case, layout, cuda, monkeypatch):
    expected = step(case, layout)
    monkeypatch.setitem(kernels._BY_DEVICE, "cpu", cuda)
    for one, right in zip(step(case, layout), expected, strict=True):
        torch.testing.assert_close(one, right, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_weights_that_are_zero_small_or_negative(cuda, dtype, layout):
    """The kernel multiplies by the scale in the end, also where only the other terms are left."""
    scale = torch.tensor([[0.0, 1e-38, -1e-30, -2.0, 3.0, 1e-6], [0.0, -0.0, 1e-20, 0.5, -1e-3, 7.0]])
    features = [draw(n, 6, 3, 5, seed=n, dtype=dtype).to(memory_format=layout) for n in (2, 3)]
    grads = [draw(*x.shape, seed=9, dtype=dtype).to(memory_format=layout) for x in features]
    mean, *drawn = (draw(2, 6, seed=seed) for seed in (1, 2, 3))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3

    for factor in (1, 1e4, 0):
        vectors = mean, scale, *(factor * vector for vector in drawn)
        actual = cuda.feature_gradients(features, grads, [0, 1], *vectors)
        wide = [vector.double() for vector in vectors]
        expected = BY_FORMULA.feature_gradients(*([x.double() for x in xs] for xs in (features, grads)), [0, 1], *wide)

        for one, right in zip(actual, expected, strict=True):
            assert one.dtype == dtype
            assert one.is_contiguous(memory_format=layout)
            allowed = tolerance * float(right.abs().max() + 1e-9)
            torch.testing.assert_close(one.double(), right, rtol=tolerance, atol=allowed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "parts", [[1, 0], [torch.tensor([0, 1]), torch.tensor([1, 1, 0])], [1, torch.tensor([1, 0, 0])]]
)
def test_gradients_come_in_any_format(cuda, parts, layout):
    """Of a sum they are one number, expanded; after a view they are in another format than the feature."""
    features = [draw(n, 4, 3, 5, seed=n).to(memory_format=layout) for n in (2, 3)]
    vectors = [draw(2, 4, seed=seed) for seed in range(4)]
    other = LAYOUTS[layout is torch.contiguous_format]

    for make in (lambda x: torch.ones(()).expand_as(x), lambda x: x.square().contiguous(memory_format=other)):
        grads = [make(x) for x in features]
        sums = cuda.backward_sums(features, grads, parts, vectors[0])
        torch.testing.assert_close(sums, BY_FORMULA.backward_sums(features, grads, parts, vectors[0]))
        gradients = cuda.feature_gradients(features, grads, parts, *vectors)
        expected = BY_FORMULA.feature_gradients(features, grads, parts, *vectors)
        for one, right in zip(gradients, expected, strict=True):
            assert one.is_contiguous(memory_format=layout)
            torch.testing.assert_close(one, right)


def test_a_variance_far_below_eps_keeps_its_digits(cuda):
    """Exchanged as 1 / sqrt(var + eps), as torch's own synchronized norm does, nothing would be left of it."""
    feature = 1e-5 * draw(4, 3, 8, 8)
    _, var = cuda.feature_statistics([feature])
    torch.testing.assert_close(var[0].double(), feature.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)

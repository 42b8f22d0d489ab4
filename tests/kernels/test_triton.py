"""Triton's passes under its interpreter, against float64; and that they compile for GPUs, without one."""

import importlib.util
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnext.kernels import cpu, formula, triton_passes, triton_plan
from bnext.kernels.one_by_one import OneByOne
from bnext.kernels.triton_passes import TritonPasses
from tests import reference
from tests.kernels.interpreter import interpreted_kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

PASSES = TritonPasses()
DEFINITION = OneByOne(formula)
SHAPES = [(2, 3, 5, 5), (0, 3, 4, 4), (3, 3, 2, 2), (1, 3, 1, 1)]
PARTS = {
    "one part each": [0, 1, 2, 3],
    "shared parts": [1, 0, 1, 3],
    "parts of samples": [torch.tensor([3, 0]), torch.zeros(0, dtype=torch.long), 0, torch.tensor([3])],
}


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    with interpreted_kernels():
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several launches, tiles, slabs and blocks of channels, with features that the interpreter gets through."""
    sizes = {"_ELEMENTS": 32, "_LONGEST": 16, "_WIDEST": 2, "_NUM_PROGRAMS": 4, "_MOST_FEATURES": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(triton_plan, name, value)
    monkeypatch.setitem(triton_passes._MERGED, "BLOCK_T", 2)
    triton_plan.plan_launches.cache_clear()
    yield
    triton_plan.plan_launches.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """The names of kernels as they are launched."""
    names = []
    start = triton_passes._start

    def note(kernel, *arguments, **constants):
        names.append(kernel)
        start(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_passes, "_start", note)
    return names


def draw(*shape, dtype=torch.float32, seed=0, layout=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=layout) if len(shape) == 4 else values.to(dtype)


def check_passes(features, grads, parts, num_parts=4):
    """All five against their definition in float64."""
    dtype = features[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    vectors = [draw(num_parts, features[0].shape[1], dtype=wide, seed=seed) for seed in range(10, 14)]
    x, dy, v = ([tensor.double() for tensor in tensors] for tensors in (features, grads, vectors))

    close = {} if dtype in (torch.float16, torch.bfloat16) else {"rtol": 1e-5, "atol": 1e-5}
    outputs = PASSES.scale_and_shift(features, parts, *vectors[:3])
    gradients = PASSES.feature_gradients(features, grads, parts, *vectors)
    for feature, output in zip(features * 2, outputs + gradients, strict=True):
        is_last = feature.is_contiguous(memory_format=torch.channels_last) if feature.dim() == 4 else False
        assert output.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    for output, expected in zip(outputs, DEFINITION.scale_and_shift(x, parts, *v[:3]), strict=True):
        torch.testing.assert_close(output, expected.to(dtype), **close)
    for gradient, expected in zip(gradients, DEFINITION.feature_gradients(x, dy, parts, *v), strict=True):
        torch.testing.assert_close(gradient, expected.to(dtype), **close)

    close = {"rtol": 1e-5, "atol": 1e-5}
    sums = PASSES.backward_sums(features, grads, parts, vectors[0])
    torch.testing.assert_close(sums, DEFINITION.backward_sums(x, dy, parts, v[0]).to(wide), **close)
    for name in ("feature_statistics", "sample_statistics"):
        expected = getattr(DEFINITION, name)(x)
        for value, right in zip(getattr(PASSES, name)(features), expected, strict=True):
            torch.testing.assert_close(value, right.to(wide), **close)


LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
QUICK = [
    (torch.float32, LAYOUTS[0], "parts of samples"),
    (torch.bfloat16, LAYOUTS[1], "shared parts"),
]


def mark_slow(case):
    return pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


CASES = [mark_slow(case) for case in product(DTYPES, LAYOUTS, PARTS)]


@pytest.mark.parametrize(("dtype", "layout", "parts"), CASES)
def test_passes_are_their_definition(dtype, layout, parts):
    features, grads = ([draw(*shape, dtype=dtype, seed=s, layout=layout) for shape in SHAPES] for s in (1, 2))
    check_passes(features, grads, PARTS[parts])

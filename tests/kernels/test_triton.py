"""Triton's passes under its interpreter, against float64; and that they compile for GPUs, without one."""

import importlib.util
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnext.kernels import cuda, formula, triton_passes, triton_plan, use_kernels
from bnext.kernels.one_by_one import OneByOne
from bnext.kernels.triton_passes import TritonPasses
from bnext.layers import BatchNorm2d, use_groups
from tests import reference
from tests.cases import CASES, randomize
from tests.kernels.interpreter import interpreted_kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

PASSES = TritonPasses(cuda)
DEFINITION = OneByOne(formula)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
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


@pytest.fixture
def small_blocks(monkeypatch):
    """Several launches, tiles, slabs and blocks of channels for features that the interpreter gets through."""
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
        like = torch.empty_like(feature)
        layout = LAYOUTS[feature.dim() == 4 and like.is_contiguous(memory_format=LAYOUTS[1])]
        assert output.is_contiguous(memory_format=layout)
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


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
QUICK = [
    (torch.float32, LAYOUTS[0], "parts of samples"),
    (torch.bfloat16, LAYOUTS[1], "shared parts"),
]


def mark_slow(case):
    return pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)


GRID = [mark_slow(case) for case in product(DTYPES, LAYOUTS, PARTS)]


@pytest.mark.parametrize(("dtype", "layout", "parts"), GRID)
def test_passes_are_their_definition(small_blocks, dtype, layout, parts):
    features, grads = ([draw(*shape, dtype=dtype, seed=s, layout=layout) for shape in SHAPES] for s in (1, 2))
    check_passes(features, grads, PARTS[parts])


def test_features_that_lie_otherwise():
    """Some channels of each, every other column, gradients that are one number, and types and layouts of two kinds."""
    wide = [draw(2, 6, 3, 5, seed=seed, layout=layout) for seed, layout in enumerate(LAYOUTS)]
    features = [wide[0][:, 1:4], wide[1][:, 2:5], wide[0][:, :3, :, ::2], wide[1][:, :3, :, ::2]]
    grads = [torch.ones(()).expand(x.shape) for x in features[:2]] + [draw(*x.shape, seed=5) for x in features[2:]]
    check_passes(features, grads, [0, torch.tensor([1, 2]), 3, 3])


SLOW_SHAPES = [(2, 2, 5), (2, 1, 3, 3), (1, 2, 1, 1)]


@pytest.mark.parametrize(
    "shape",
    [(3, 2), (2, 2, 2, 2, 3), (0, 2, 3, 3), *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES)],
)
def test_features_of_all_dimensions(shape):
    features = [draw(*shape), draw(*shape, seed=1).transpose(0, 1).contiguous().transpose(0, 1)]
    check_passes(features, [draw(*shape, seed=2)] * 2, [0, torch.ones(shape[0], dtype=torch.long)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_keep_their_digits_at_a_large_mean(small_blocks, layout):
    """As test_cpu.py asks of the others; over many tiles and slabs."""
    feature = draw(4, 2, 12, 12, layout=layout) + 1e4
    mean, var = PASSES.feature_statistics([feature])
    _, true_mean, true_var = reference.moments_of([feature])
    assert ((var[0].double() - true_var) / true_var).abs().max() < 1e-4
    assert ((mean[0].double() - true_mean) / true_var.sqrt()).abs().max() < 2e-3


def test_huge_features_have_64_bits():
    """A stride beyond 32 bits, of a feature that has no memory between its samples or channels."""
    strides = (2**33, 2**32, 2, 1)
    form = triton_plan.Form((2, 3, 2, 2), strides, torch.float32)
    (launch,) = triton_plan.plan_launches(((form,),), (0,), (False,))
    assert launch.constants["IS_HUGE"]
    assert launch.strides[0].sample[0] > 2**33


def test_a_norm_of_five_levels_takes_six_launches(launches):
    features = [draw(1, 2, size, size, seed=size) for size in (24, 12, 6, 3, 1)]
    parts, vector = [0] * 5, torch.ones(1, 2)
    PASSES.feature_statistics(features)
    PASSES.scale_and_shift(features, parts, vector, vector, vector)
    assert launches == ["take_statistics", "merge_statistics", "transform"]

    launches.clear()
    PASSES.backward_sums(features, features, parts, vector)
    PASSES.feature_gradients(features, features, parts, vector, vector, vector, vector)
    assert launches == ["sum_tiles", "merge_sums", "transform"]


def test_rois_have_their_statistics_in_one_launch(launches):
    PASSES.sample_statistics([draw(3, 2, 7, 7)])
    assert launches == ["take_statistics"]


class NoteOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **options or {})


def test_torch_only_makes_empty_tensors(monkeypatch):
    """Nothing is copied to the device or read from it; the kernels are as good as not there."""
    monkeypatch.setattr(triton_passes, "_start", lambda *arguments, **constants: None)
    features, parts = [draw(2, 2, 3, 3), draw(2, 2, 2, 2)], [torch.tensor([1, 0]), 1]
    vectors = [draw(2, 2)] * 4
    with NoteOperators() as noted:
        PASSES.feature_statistics(features)
        PASSES.sample_statistics(features)
        PASSES.scale_and_shift(features, parts, *vectors[:3])
        PASSES.backward_sums(features, features, parts, vectors[0])
        PASSES.feature_gradients(features, features, parts, *vectors)
    assert noted.names <= {"new_empty", "empty_like", "empty_permuted", "unbind", "detach", "promote_types"}


# ---- the switch


QUICK_NORMS = {"levels-row1", "levels-row6", "domains-mixed", "ghost2"}
NORMS = [
    pytest.param(*norm.values, id=norm.id, marks=() if norm.id in QUICK_NORMS else pytest.mark.slow) for norm in CASES
]


def run(case, kind):
    """Everything that a training step of a norm computes."""
    norm = case.build().train()
    inputs = case.inputs(requires_grad=True)
    with use_kernels(kind):
        outputs = case.call(norm, inputs)
        sum((output * output.detach().cos()).sum() for output in outputs.values()).backward()
    gradients = [tensor.grad for tensor in [*inputs.values(), *norm.parameters()]]
    return [*outputs.values(), *gradients, *norm.buffers()]


def test_dealt_groups_compute_the_same(launches):
    """As RoIs are dealt to groups, one of which is empty: parts that only a tensor knows."""
    results = []
    for kind in ("triton", "torch"):
        norm, rois = randomize(BatchNorm2d(3).double()), draw(5, 3, 2, 2, dtype=torch.float64).requires_grad_()
        with use_kernels(kind), use_groups(norm, torch.tensor([2, 0, 2, 3, 0]), 4):
            output = norm(rois)
            (output * output.detach().cos()).sum().backward()
        results.append([output, rois.grad, norm.weight.grad, norm.running_var])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    forward, backward = ["take_statistics", "merge_statistics", "transform"], ["sum_tiles", "merge_sums", "transform"]
    assert set(launches) == set(forward + backward)
    assert launches[-3:] == backward


@pytest.mark.parametrize("case", NORMS)
def test_norms_compute_the_same(launches, case):
    torch.testing.assert_close(run(case, "triton"), run(case, "torch"), rtol=1e-11, atol=1e-11)
    is_one_mini_batch = len(case.names) == len(set(case.mini_batches_of(case.inputs()))) == 1
    assert launches or case.is_normalized_by_population or is_one_mini_batch  # which torch has one kernel for

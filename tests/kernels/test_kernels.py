"""Every file of passes against their definition in float64, values and layouts; and who gets which file."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bnext import kernels
from bnext.kernels import cpu, cuda, formula
from tests.kernels.cuda_operators import registered

FILES = [cpu, cuda, formula]
PASSES = ["backward_sums", "feature_gradient", "feature_statistics", "sample_statistics", "scale_and_shift"]
FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPE = (5, 3, 4, 6)


def draw(*shape, dtype=torch.float64, seed=0, layout=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=layout) if len(shape) == 4 else values.to(dtype)


def draw_vectors(number, per_sample, dtype):
    """Vectors [C] or [N, C], as the passes get them, and as they stand beside a feature in float64."""
    shape = SHAPE[:2] if per_sample else SHAPE[1:2]
    vectors = [draw(*shape, dtype=dtype, seed=seed) for seed in range(number)]
    return vectors, [vector.double().view(-1, SHAPE[1], 1, 1) for vector in vectors]


@pytest.fixture(params=FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def file(request):
    if request.param is not cuda:
        yield request.param
        return
    with registered():  # torch has them for CUDA alone
        yield request.param


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_passes_are_their_definition(file, dtype, per_sample, layout):
    x, dy = (draw(*SHAPE, dtype=dtype, seed=seed, layout=layout) for seed in (8, 9))
    wide = torch.promote_types(dtype, torch.float32)
    (mean, a, b, c), (wide_mean, wide_a, wide_b, wide_c) = draw_vectors(4, per_sample, wide)
    centered, gradient = x.double() - wide_mean, dy.double()
    dims = [2, 3] if per_sample else [0, 2, 3]

    output = file.scale_and_shift(x, mean, a, b)
    sums = file.backward_sums(x, dy, mean)
    grad = file.feature_gradient(x, dy, mean, a, b, c)

    torch.testing.assert_close(output, (wide_a * centered + wide_b).to(dtype))
    torch.testing.assert_close(grad, (wide_a * gradient + wide_b * centered + wide_c).to(dtype))
    expected = torch.stack([gradient.sum(dims), (gradient * centered).sum(dims)])
    torch.testing.assert_close(sums, expected.to(wide), rtol=1e-5, atol=1e-5)
    assert output.is_contiguous(memory_format=layout)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [SHAPE, (5, 3, 1, 1), (1, 3, 4, 6), (4, 1, 3, 3)])
def test_statistics_are_their_definition(file, shape, layout):
    x = draw(*shape, layout=layout) * 2 + 5
    for measure, dims in ((file.feature_statistics, [0, 2, 3]), (file.sample_statistics, [2, 3])):
        mean, var = measure(x)
        torch.testing.assert_close(mean, x.mean(dims), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(var, x.var(dims, correction=0), rtol=1e-12, atol=1e-12)


def test_rows_without_positions_have_one(file):
    """[N, C], also where the samples have statistics and vectors of their own."""
    x, dy, mean = (draw(5, 3, seed=seed).t().contiguous().t() for seed in range(3))
    assert torch.equal(file.sample_statistics(x)[0], x)
    assert not file.sample_statistics(x.float())[1].any()
    torch.testing.assert_close(file.backward_sums(x, dy, mean), torch.stack([dy, dy * (x - mean)]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)])
def test_an_empty_feature_has_zeros(shape):
    x, v = torch.empty(shape, dtype=torch.float16), torch.ones(2, 3)
    for statistics, size in ((kernels.feature_statistics, (1, 3)), (kernels.sample_statistics, shape[:2])):
        mean, var = statistics([x])
        assert mean.shape == var.shape == size
        assert mean.dtype == var.dtype == torch.float32
        assert not mean.any()
        assert not var.any()
    for part in (1, torch.ones(shape[:1], dtype=torch.long)):
        assert kernels.scale_and_shift([x], [part], v, v, v)[0].shape == shape
        assert kernels.feature_gradients([x], [x], [part], v, v, v, v)[0].shape == shape
        assert torch.equal(kernels.backward_sums([x], [x], [part], v), torch.zeros(2, 2, 3))


def test_the_device_chooses_the_file_and_a_compiler_gets_the_formula(monkeypatch):
    assert choose(torch.ones(1)) is cpu
    assert choose(torch.ones(1, device="meta")) is formula
    monkeypatch.setitem(kernels._BY_DEVICE, "cpu", kernels._BY_DEVICE["cuda"])
    assert choose(torch.ones(1)) is cuda
    assert kernels.has_exact_batch_norm(torch.ones(2, 3, 1, 1))
    with FakeTensorMode():
        assert choose(torch.ones(1)) is formula
    assert torch.func.vmap(lambda x: x * (choose(x) is formula))(torch.ones(1)).all()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(torch.ones(1)) is formula


def choose(feature):
    return kernels._choose(feature).file


def test_files_of_devices_have_all_passes(file):
    has_row = any(file is passes.file for passes in kernels._BY_DEVICE.values())
    assert set(PASSES) | ({"has_exact_batch_norm"} if has_row else set()) <= set(file.__all__)

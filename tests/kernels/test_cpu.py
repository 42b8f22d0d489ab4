"""Statistics on a CPU keep their digits where those of torch's kernels lose them."""

import pytest
import torch

from bnext.functional import normalize_mini_batch
from bnext.kernels import cpu, formula
from tests import reference

FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(shape, offset, layout=torch.contiguous_format, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) + offset
    return values.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_variance_survives_a_large_mean_in_float32(ratio, layout):
    data = draw((4, 8, 48, 48), ratio, layout)
    mean, var = cpu.feature_statistics(data)
    _, true_mean, true_var = reference.moments_of([data])
    assert ((var.double() - true_var) / true_var).abs().max() < 1e-4
    assert ((mean.double() - true_mean) / true_var.sqrt()).abs().max() < 2e-3
    naive = data.square().mean((0, 2, 3)) - data.mean((0, 2, 3)).square()
    assert ((naive.double() - true_var) / true_var).abs().max() > 1e-4, "the data are too easy for this test"


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(2, 3, 130, 131), (5, 3, 64, 64), (40_000, 3, 1, 1), (4, 1, 130, 131)])
def test_many_rows_in_channels_last_keep_their_variance(shape, offset):
    data = draw(shape, offset, torch.channels_last)
    mean, var = cpu.feature_statistics(data)
    _, true_mean, true_var = reference.moments_of([data])
    torch.testing.assert_close(mean.double(), true_mean, rtol=0, atol=5e-3 if offset else 1e-6)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-4 if offset else 1e-5, atol=0)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_accumulated_in_float32(dtype, layout):
    data = draw((8, 2, 64, 64), 100, layout, dtype)
    mean, var = cpu.feature_statistics(data)
    assert mean.dtype == var.dtype == torch.float32
    _, true_mean, true_var = reference.moments_of([data])
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-5, atol=0)


def test_torchs_batch_norm_is_taken_only_where_it_is_exact():
    """A feature whose statistics torch's kernel has wrong is not one of them; if this fails, torch was mended."""
    assert cpu.has_exact_batch_norm(draw((2, 3, 4, 4), 0))
    for wrong in (draw((2, 3, 4, 4), 0, dtype=torch.float16), draw((300_000, 3, 1, 1), 1e4)):
        assert not cpu.has_exact_batch_norm(wrong)
    _, _, true_var = reference.moments_of([wrong])
    var = torch.batch_norm_update_stats(wrong, None, None, 0.0)[1]
    assert ((var.double() - true_var) / true_var).abs().max() > 1


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(7, 5, 9, 5), (3, 70, 6, 4), (50, 3, 1, 1), (1, 2, 30, 7)])
def test_pieces_make_the_whole(shape, layout, monkeypatch):
    """Pieces of a few planes, rows and samples, the last one smaller; of one sample each, too."""
    x, dy = (draw(shape, 3, layout, torch.float64).roll(seed, 0) for seed in range(2))
    vectors = [torch.randn(shape[:2], dtype=torch.float64) for _ in range(4)]
    mean = vectors[0].unsqueeze(-1).unsqueeze(-1)
    for name, value in {"_SHORT": 0, "_WIDTH": 12, "_SUMMANDS": 2}.items():
        monkeypatch.setattr(cpu, name, value)

    for piece in (1, 150):
        monkeypatch.setattr(cpu, "_PIECE", piece)
        for measure, dims in ((cpu.feature_statistics, (0, 2, 3)), (cpu.sample_statistics, (2, 3))):
            torch.testing.assert_close(measure(x), (x.mean(dims), x.var(dims, correction=0)))
        sums = torch.stack([dy.sum((2, 3)), (dy * (x - mean)).sum((2, 3))])
        torch.testing.assert_close(cpu.backward_sums(x, dy, vectors[0]), sums)
        _, scale, slope, offset = (vector.unsqueeze(-1).unsqueeze(-1) for vector in vectors)
        torch.testing.assert_close(cpu.scale_and_shift(x, *vectors[:3]), (x - mean) * scale + slope)
        expected = scale * dy + slope * (x - mean) + offset
        torch.testing.assert_close(cpu.feature_gradient(x, dy, *vectors), expected)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("has_affine", [True, False])
def test_a_mini_batch_by_itself_is_torchs_batch_norm(has_affine, layout):
    """Also twice differentiated, and where the affine has another type."""
    x = draw((3, 4, 5, 6), 2, layout, torch.float64).requires_grad_()
    affine = [draw((4,), 1).requires_grad_() for _ in range(2)] if has_affine else [None, None]
    wide = [None if vector is None else vector.double() for vector in affine]

    output, moments = normalize_mini_batch(x, *affine, 1e-5)
    expected = torch.nn.functional.batch_norm(x, None, None, *wide, True, 0.0, 1e-5)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(moments.var[0], x.var((0, 2, 3), correction=0))
    assert output.is_contiguous(memory_format=layout)
    assert not moments.mean.requires_grad

    for order in range(2):
        sources = [x, *affine] if has_affine else [x]
        pairs = [torch.autograd.grad(y.pow(3).sum(), sources, create_graph=True) for y in (output, expected)]
        torch.testing.assert_close(*pairs)
        output, expected = (gradients[0] for gradients in pairs)
        assert order == 1 or output.requires_grad


@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (600, 1, 1, 1), (3, 2, 17, 19), (1, 1, 2, 8209)])
def test_few_channels_and_one_thread(shape):
    """Fewer rows than fit side by side; planes that cannot be cut into lines."""
    x = draw(shape, 3)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for layout in FORMATS:
            mean, var = cpu.feature_statistics(x.contiguous(memory_format=layout))
            _, true_mean, true_var = reference.moments_of([x])
            torch.testing.assert_close((mean.double(), var.double()), (true_mean, true_var), rtol=2e-6, atol=2e-6)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (2, 3, 5, 1), (2, 3, 1, 4), (4, 3, 1, 1)])
def test_a_gradient_may_lie_otherwise_than_its_feature(shape):
    """As that of a picture [H, W, C]: torch's kernels go by its strides, of which those of size 1 say nothing."""
    x, dy = (draw(shape, 1, dtype=torch.float64) for _ in range(2))
    odd = torch.empty_strided(shape, (shape[1], 1, shape[3] * shape[1], shape[1])) if shape[0] == 1 else None
    layouts = [dy, dy.to(memory_format=torch.channels_last), torch.ones(()).double().expand(shape)]
    layouts += [] if odd is None else [odd.double().copy_(dy)]
    vectors = [torch.randn(shape[:2], dtype=torch.float64) for _ in range(4)]

    for feature in (x, x.to(memory_format=torch.channels_last), x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        for grad in layouts:
            for form in (vectors, [vector[0] for vector in vectors]):
                expected = formula.backward_sums(feature, grad, form[0])
                torch.testing.assert_close(cpu.backward_sums(feature, grad, form[0]), expected)

            leaf = feature.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            actual = torch.autograd.grad(normalize_mini_batch(leaf, None, None, 1e-5)[0], leaf, grad)
            plain = x.clone().requires_grad_()
            output = torch.nn.functional.batch_norm(plain, None, None, None, None, True)
            torch.testing.assert_close(actual, torch.autograd.grad(output, plain, grad.contiguous()))

"""Statistics on a CPU keep their digits where those of torch's kernels lose them."""

import pytest
import torch

from bnext.kernels import cpu, cuda
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
    assert ((cuda.feature_statistics(wrong)[1].double() - true_var) / true_var).abs().max() > 1

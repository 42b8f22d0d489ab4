"""Digits: a large mean, half types, and float64 throughout, for every way of taking statistics."""

import pytest
import torch

from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope import use_domain
from tests import reference
from tests.cases import DOMAINS
from tests.workers import run_workers

C = 3
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
SPECS = {
    "plain": NormSpec(),
    "ghost": NormSpec(normalization_batch_size=3),
    "renorm": NormSpec(training="renorm", r_max=1, d_max=0),
    "cumulative": NormSpec(average="cumulative"),
    "population": NormSpec(training="population"),
    "domains": OWN,
    "domains_one_batch": OWN.replace(statistics="shared"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


def draw(offset, n=8, side=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, C, side, side, generator=generator, dtype=torch.float64) + offset).to(dtype)


def run(norm, x, names):
    with use_domain(names):
        return norm(x)


def names_of(spec, n):
    return [DOMAINS[index % 2] if spec.domains else "any" for index in range(n)]


def expected_moments(x, names, name):
    members = [y.unsqueeze(0) for y, own in zip(x, names, strict=True) if own == name]
    return reference.moments_of(members)


@formats
@every_spec
def test_running_variance_at_offset_ten_thousand(spec, memory_format):
    norm = BatchNorm2d(C, spec.replace(momentum=1.0)).train()
    x = draw(1e4).contiguous(memory_format=memory_format)
    names = names_of(spec, len(x))
    run(norm, x, names)
    for name in set(names):
        count, mean, var = expected_moments(x, names, name)
        var = var * count / (count - 1)
        state = norm.population_state(name)
        assert ((state.running_var.double() - var) / var).abs().max() < 1e-4
        assert ((state.running_mean.double() - mean) / var.sqrt()).abs().max() < 2e-3
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert ((naive.double() - 1).abs()).max() > 0.01, "the data are too easy for this test"


@formats
@pytest.mark.parametrize("name", ["plain", "ghost", "renorm", "domains", "domains_one_batch"])
def test_outputs_and_gradients_at_offset_ten_thousand(name, memory_format):
    spec = SPECS[name]
    results = []
    for dtype in (torch.float32, torch.float64):
        norm = BatchNorm2d(C, spec).to(dtype).train()
        x = draw(1e4).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        output = run(norm, x, names_of(spec, len(x)))
        results.append((output, *torch.autograd.grad(output.pow(3).sum(), x)))
    # float32 holds x itself to 5e-4 standard deviations there; that is the same number in both.
    for actual, expected in zip(*results, strict=True):
        assert (actual.double() - expected).abs().max() < 5e-3 * max(1, float(expected.detach().abs().max()))


@pytest.mark.parametrize("row", [1, 4])
@formats
def test_running_variance_of_levels_at_offset_ten_thousand(row, memory_format):
    norm = LevelBatchNorm2d(C, ("p3", "p4"), NormSpec.from_table5_row(row).replace(momentum=1.0)).train()
    features = {"p3": draw(1e4), "p4": draw(1e4, side=24)}
    norm({level: x.contiguous(memory_format=memory_format) for level, x in features.items()})
    for members, level in [(list(features.values()), "p3")] if row == 1 else [([x], k) for k, x in features.items()]:
        count, _, var = reference.moments_of(members)
        actual = norm.population_state(level).running_var.double()
        assert ((actual - var * count / (count - 1)) / var).abs().max() < 1e-4


@formats
@every_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_accumulated_in_float32(spec, dtype, memory_format):
    norm = BatchNorm2d(C, spec.replace(momentum=1.0)).train()
    x = draw(30.0, dtype=dtype).contiguous(memory_format=memory_format)
    names = names_of(spec, len(x))
    output = run(norm, x, names)
    assert output.dtype == dtype
    for name in set(names):
        count, mean, var = expected_moments(x.double(), names, name)
        state = norm.population_state(name)
        torch.testing.assert_close(state.running_mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(state.running_var.double(), var * count / (count - 1), rtol=2e-5, atol=0)
    if spec.training == "population":
        return
    wide = BatchNorm2d(C, spec.replace(momentum=1.0)).double().train()
    expected = run(wide, x.double(), names)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=rounding)


@every_spec
def test_float64_stays_float64(spec):
    norm = BatchNorm2d(C, spec).double().train()
    x = draw(1e4, side=6, dtype=torch.float64).requires_grad_()
    output = run(norm, x, names_of(spec, len(x)))
    output.sum().backward()
    found = [output, x.grad, *norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())]
    assert {tensor.dtype for tensor in found} == {torch.float64}


def test_a_constant_channel_gives_its_bias_and_finite_gradients():
    for spec in SPECS.values():
        norm = BatchNorm2d(C, spec).train()
        x = torch.full((4, C, 3, 3), 7.0).requires_grad_()
        output = run(norm, x, names_of(spec, 4))
        output.square().sum().backward()
        if spec.training != "population":
            assert output.abs().max() < 1e-3
        assert torch.isfinite(x.grad).all()


def test_gradients_are_those_of_finite_differences():
    for spec in SPECS.values():
        if spec.training == "population":
            continue
        x = draw(1.0, n=4, side=2, dtype=torch.float64).requires_grad_()
        weight = torch.rand_like(x)

        def loss(x, spec=spec, weight=weight):
            return (run(BatchNorm2d(C, spec).double().train(), x, names_of(spec, 4)) * weight).sum()

        assert torch.autograd.gradcheck(loss, (x,)) or spec.training == "renorm"


def offset_variance(rank, memory_format):
    generator = torch.Generator().manual_seed(rank)
    x = (torch.randn(4, C, 48, 48, generator=generator) + 1e4).contiguous(memory_format=memory_format)
    norm = BatchNorm2d(C, NormSpec(workers="all", momentum=1.0)).train()
    norm(x)
    return x, norm.running_var


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_variance_at_offset_ten_thousand_by_two_workers(memory_format):
    results = run_workers(offset_variance, 2, memory_format)
    count, _, var = reference.moments_of([x for x, _ in results])
    expected = var * count / (count - 1)
    for _, actual in results:
        assert ((actual.double() - expected) / expected).abs().max() < 1e-4

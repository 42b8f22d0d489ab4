"""Standard errors of pooled moments: what numpy makes of the batches, in whatever order and parts they are merged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnext.functional import (
    Moments,
    Spread,
    batch_moments,
    merge_moments,
    merge_spreads,
    share_of_variance,
    spread_of_batch,
    stack_parts,
    standard_errors,
)

CHANNELS = 3


def make_batches(number, seed=0, offset=0.0):
    """Batches of unequal size, mean and scale, [N, C, H, W] in float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1 + k % 3, CHANNELS, 2 + k % 2, 3) for k in range(number)]
    return [
        torch.randn(size, generator=generator, dtype=torch.float64) * (1 + k % 4) + k % 5 + offset
        for k, size in enumerate(sizes)
    ]


def measure(batches):
    """Standard errors by one merge of all."""
    moments = [batch_moments(batch) for batch in batches]
    spread = merge_spreads(stack_parts([spread_of_batch(own) for own in moments]))
    return standard_errors(spread, merge_moments(stack_parts(moments))), spread


def define(batches):
    """As numpy has it, on stored batches, each weighted by its elements."""
    rows = [batch.movedim(1, 0).flatten(1).numpy() for batch in batches]
    everything = np.concatenate(rows, axis=1)
    mean, var = everything.mean(1), everything.var(1)
    share = np.array([row.shape[1] / everything.shape[1] for row in rows])[:, None]
    number = 1 / (share**2).sum()  # of equal batches that would be as good
    means = np.stack([row.mean(1) for row in rows])
    variances = np.stack([row.var(1) for row in rows]) + (means - mean) ** 2
    scatter = [(share**2 * (values - pooled) ** 2).sum(0) for values, pooled in ((means, mean), (variances, var))]
    return [np.sqrt(values * number / (number - 1)) for values in scatter]


def test_batches_of_one_size_have_the_error_of_a_mean():
    batches = [torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64) + k for k in range(5)]
    means = torch.stack([batch.mean([0, 2, 3]) for batch in batches])
    torch.testing.assert_close(measure(batches)[0][0], means.std(0) / 5**0.5, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [2, 3, 17])
def test_standard_errors_are_those_of_numpy(number):
    batches = make_batches(number)
    errors, spread = measure(batches)
    for error, expected in zip(errors, define(batches), strict=True):
        torch.testing.assert_close(error, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert spread.num_batches == number


@given(
    st.permutations(range(9)),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.floats(-1e4, 1e4),
    st.sets(st.integers(0, 8), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_the_order_and_the_parts_do_not_matter(order, cuts, offset, empty):
    """Batches in any order, merged in any parts, empty batches among them."""
    batches = make_batches(9, offset=offset)
    (mean_error, var_error), spread = measure(batches)
    parts = [[]]
    for position, index in enumerate(order):
        if position and cuts[position - 1]:
            parts.append([])
        parts[-1].append(spread_of_batch(batch_moments(batches[index])))
        if position in empty:
            parts[-1].append(spread_of_batch(batch_moments(torch.empty(0, CHANNELS, 2, 2).double())))
    merged = merge_spreads(stack_parts([merge_spreads(stack_parts(part)) for part in parts]))
    assert merged.num_batches == 9
    pooled = merge_moments(stack_parts([batch_moments(batch) for batch in batches]))
    for error, expected in zip(standard_errors(merged, pooled), (mean_error, var_error), strict=True):
        torch.testing.assert_close(error, expected, rtol=1e-10, atol=1e-10)
    mean_of_means = [own.center + own.first[0] for own in (merged, spread)]
    torch.testing.assert_close(*mean_of_means, rtol=1e-10, atol=1e-10)


def test_far_from_zero():
    """A mean of a million standard deviations: float64 keeps ten digits of the data, and so do the errors."""
    near, far = make_batches(12), make_batches(12, offset=1e6)
    for error, expected in zip(measure(far)[0], measure(near)[0], strict=True):
        torch.testing.assert_close(error, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_batches_tell_nothing(number):
    empty = torch.empty(0, CHANNELS, 1, 1).double()
    (mean_error, var_error), spread = measure([*make_batches(number), empty, empty])
    assert spread.num_batches == number
    assert torch.isinf(mean_error).all()
    assert torch.isinf(var_error).all()


def test_equal_batches_have_no_error():
    (mean_error, var_error), _ = measure([make_batches(1)[0]] * 5)
    torch.testing.assert_close(torch.stack([mean_error, var_error]), torch.zeros(2, CHANNELS).double())


def test_leading_dimensions_are_merged_apart_from_channels():
    """An empty part in front lends nothing, not even its center."""
    own = spread_of_batch(batch_moments(make_batches(1, offset=7.0)[0]))
    zeros = torch.zeros(CHANNELS).double()
    nothing = spread_of_batch(Moments(torch.zeros(()).double(), zeros, zeros))
    merged = merge_spreads(stack_parts([nothing, own]))
    assert isinstance(merged, Spread)
    for field, expected in zip(merged, own, strict=True):
        assert torch.equal(field, expected)


@pytest.mark.parametrize("sizes", [(16,), (1, 4, 60)])
def test_the_standard_error_is_honest(sizes):
    """Batches of a known distribution: the true error is 0.67 standard errors in the median, as a normal one's."""
    generator = torch.Generator().manual_seed(3)
    num_channels, number = 2000, 96
    center = torch.randn(number, num_channels, generator=generator, dtype=torch.float64)  # between batches: variance 1
    moments = []
    for k in range(number):  # within: 4
        size = sizes[k % len(sizes)]
        noise = torch.randn(size, num_channels, generator=generator, dtype=torch.float64) * 2
        moments.append(batch_moments(center[k] + noise))
    pooled = merge_moments(stack_parts(moments))
    spread = merge_spreads(stack_parts([spread_of_batch(own) for own in moments]))
    mean_error, var_error = standard_errors(spread, pooled)
    assert 0.62 < float((pooled.mean.abs() / mean_error).median()) < 0.72
    assert 0.60 < float(((pooled.var - 5).abs() / var_error).median()) < 0.75


def test_a_few_large_batches_are_not_many():
    """Three batches of 64 among 93 of 2 are as good as nine of one size."""
    generator = torch.Generator().manual_seed(3)
    moments = []
    for k in range(96):
        shared = torch.randn(2000, generator=generator, dtype=torch.float64)
        noise = torch.randn(64 if k % 32 == 31 else 2, 2000, generator=generator, dtype=torch.float64)
        moments.append(batch_moments(shared + 2 * noise))
    pooled = merge_moments(stack_parts(moments))
    mean_error, _ = standard_errors(merge_spreads(stack_parts([spread_of_batch(own) for own in moments])), pooled)
    assert float((pooled.mean.abs() < 2 * mean_error).double().mean()) > 0.85


def test_shares_of_variance_are_those_of_shuffled_passes_over_a_set():
    """As 2,000 shuffles have it: of a part, of all, and of another part after a whole pass."""
    values = np.random.default_rng(0).standard_normal(20)
    generator = np.random.default_rng(1)
    for number in (5, 15, 20, 30, 45):
        means = np.empty(2000)
        for draw in range(2000):
            stream = np.concatenate([generator.permutation(values) for _ in range(3)])
            means[draw] = stream[:number].mean()
        expected = means.var() / (values.var(ddof=1) / number)
        assert share_of_variance(number, 20) == pytest.approx(expected, rel=0.1, abs=1e-9)
    assert share_of_variance(20, 20, batch_size=8) == 2 / 8
    assert [share_of_variance(number, 20, batch_size=2) for number in (10, 20)] == [1, 1]
    assert share_of_variance(10, 20, batch_size=1) == 1
    assert share_of_variance(0, 20) == 1

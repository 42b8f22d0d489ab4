"""Moments against their definition; merging is free of order and of the split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnext.functional import (
    Moments,
    batch_moments,
    group_moments,
    merge_moments,
    part_moments,
    sample_moments,
    stack_parts,
    update_running_statistics,
)
from tests import reference, strategies

BATCH = 24


def pick(parts, indices):
    """Some parts, in an order."""
    return Moments(*(field[torch.tensor(indices)] for field in parts))


def random_parts(seed: int, sizes: list[int], offset: float = 3.0, side: int = 2) -> tuple[torch.Tensor, Moments]:
    """A batch [BATCH, 3, side, side], and the moments of its splits."""
    data = (
        torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    )
    parts = [batch_moments(part) for part in data.split(sizes)]
    return data, stack_parts(parts)


def assert_moments(actual: Moments, expected: tuple[int, torch.Tensor, torch.Tensor]) -> None:
    count, mean, var = expected
    assert int(actual.count) == count
    torch.testing.assert_close(actual.mean.double(), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual.var.double(), var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 4, 2), (2, 3, 4, 2, 3), (1, 3, 1, 1)])
def test_batch_moments_are_the_definition(shape):
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    assert_moments(batch_moments(data), reference.moments_of([data]))


@given(strategies.seeds, strategies.splits(BATCH))
@settings(max_examples=40, deadline=None)
def test_any_split_of_a_batch_merges_to_the_same_moments(seed, sizes):
    data, parts = random_parts(seed, sizes)
    assert_moments(merge_moments(parts), reference.moments_of([data]))


@given(strategies.seeds, strategies.splits(BATCH), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_merging_is_free_of_order_and_of_grouping(seed, sizes, random):
    data, parts = random_parts(seed, sizes)
    order = list(range(len(sizes)))
    random.shuffle(order)
    assert_moments(merge_moments(pick(parts, order)), reference.moments_of([data]))
    running = pick(parts, order[:1])
    for index in order[1:]:  # one after another
        added = pick(parts, [index])
        pair = Moments(*(torch.cat(fields) for fields in zip(running, added, strict=True)))
        running = Moments(*(field.unsqueeze(0) for field in merge_moments(pair)))
    assert_moments(Moments(*(field[0] for field in running)), reference.moments_of([data]))


@given(strategies.seeds, strategies.splits(BATCH))
@settings(max_examples=20, deadline=None)
def test_merged_variance_at_offset_ten_thousand_in_float32(seed, sizes):
    data, _ = random_parts(seed, sizes, offset=1e4, side=16)
    data = data.float()
    parts = [batch_moments(part) for part in data.split(sizes)]
    merged = merge_moments(stack_parts(parts))
    _, _, var = reference.moments_of([data])
    assert ((merged.var.double() - var) / var).abs().max() < 1e-4


def test_only_empty_parts_merge_to_nothing():
    merged = merge_moments(Moments(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3)))
    assert merged.count == 0
    assert torch.equal(merged.mean, torch.zeros(3))
    assert torch.equal(merged.var, torch.zeros(3))


@given(strategies.seeds, strategies.splits(BATCH), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_grouping_then_merging_is_merging(seed, sizes, num_groups):
    data, parts = random_parts(seed, sizes)
    owners = torch.randint(num_groups, (len(sizes),), generator=torch.Generator().manual_seed(seed))
    assert_moments(merge_moments(group_moments(parts, owners, num_groups)), reference.moments_of([data]))


def test_sample_moments_are_those_of_each_sample():
    data = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 3
    moments = sample_moments(data)
    for index in range(5):
        assert_moments(Moments(*(field[index] for field in moments)), reference.moments_of([data[index : index + 1]]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_samples_without_positions_have_count_zero(shape):
    count, mean, var = sample_moments(torch.empty(shape))
    assert torch.equal(count, torch.zeros(shape[0]))
    assert mean.shape == var.shape == (shape[0], 3)


@given(strategies.seeds, st.lists(st.integers(0, 3), min_size=BATCH, max_size=BATCH), st.booleans())
@settings(max_examples=40, deadline=None)
def test_part_moments_are_those_of_the_parts(seed, owners, is_channels_last):
    data, _ = random_parts(seed, [BATCH])
    other = data[:5, :, :1] * 2
    feature = data.contiguous(memory_format=torch.channels_last) if is_channels_last else data
    moments = part_moments([feature, other], [torch.tensor(owners), 2], 4)
    for part in range(4):
        members = [x.unsqueeze(0) for x, owner in zip(data, owners, strict=True) if owner == part]
        members += [other] if part == 2 else []
        own = Moments(*(field[part] for field in moments))
        if members:
            assert_moments(own, reference.moments_of(members))
        else:
            assert own.count == 0


def test_unbiased_variance_divides_by_one_less():
    data = torch.randn(3, 2, 2, 1, dtype=torch.float64)
    torch.testing.assert_close(batch_moments(data).unbiased_var(), reference.per_channel_rows([data]).var(1))
    one = Moments(torch.tensor([0.0, 1.0]), torch.ones(2, 3), torch.zeros(2, 3))
    assert torch.equal(one.unbiased_var(), torch.zeros(2, 3))


# ---- running statistics


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_is_that_of_torch(dtype, momentum):
    bn = nn.BatchNorm2d(4, momentum=momentum).to(dtype).train()
    mean, var = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    for seed in range(3):
        data = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 2
        bn(data)
        mean, var = update_running_statistics(mean, var, batch_moments(data), momentum)
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {}
    torch.testing.assert_close(mean, bn.running_mean, **tolerance)
    torch.testing.assert_close(var, bn.running_var, **tolerance)


def test_momentum_may_be_a_tensor():
    data = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    old = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    by_number = update_running_statistics(*old, batch_moments(data), 0.25)
    by_tensor = update_running_statistics(*old, batch_moments(data), torch.tensor(0.25))
    assert all(torch.equal(a, b) for a, b in zip(by_number, by_tensor, strict=True))


@pytest.mark.parametrize("count", [0.0, 1.0])
def test_fewer_than_two_elements_change_nothing(count):
    moments = Moments(torch.tensor(count), torch.full((3,), 9.0), torch.zeros(3))
    mean, var = update_running_statistics(torch.ones(3), torch.full((3,), 2.0), moments, 0.5)
    assert torch.equal(mean, torch.ones(3))
    assert torch.equal(var, torch.full((3,), 2.0))


def test_old_values_are_not_changed_and_keep_their_type():
    mean, var = torch.zeros(3, dtype=torch.float16), torch.ones(3, dtype=torch.float16)
    new = update_running_statistics(mean, var, batch_moments(torch.randn(4, 3, 2, 2)), 0.5)
    assert {tensor.dtype for tensor in new} == {torch.float16}
    assert torch.equal(mean, torch.zeros(3).half())
    assert torch.equal(var, torch.ones(3).half())
    assert not torch.equal(new[0], mean)

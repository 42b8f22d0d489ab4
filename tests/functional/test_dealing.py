"""A deal is even, complete, a matter of its seed alone, and random over the samples of every worker."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnext.functional import deal_samples
from tests.strategies import seeds

shares = st.lists(st.integers(0, 12), min_size=1, max_size=5)


@given(shares, st.integers(1, 9), seeds)
def test_every_sample_gets_a_group_and_sizes_differ_by_at_most_one(num_samples, num_groups, seed):
    deal = deal_samples(num_samples, num_groups, seed)
    assert [(len(own), own.dtype, own.device.type) for own in deal] == [(n, torch.int64, "cpu") for n in num_samples]
    sizes = torch.cat(deal).bincount(minlength=num_groups)
    assert len(sizes) == num_groups
    assert int(sizes.sum()) == sum(num_samples)
    assert int(sizes.max() - sizes.min()) <= 1


@given(shares, st.integers(1, 9), seeds, seeds)
def test_it_is_reproducible_from_the_seed_whatever_torchs_generator_is_at(num_samples, num_groups, seed, other):
    torch.manual_seed(other)
    before = torch.get_rng_state()
    deals = [torch.cat(deal_samples(num_samples, num_groups, seed)) for _ in range(2)]
    assert torch.equal(*deals)
    assert torch.equal(torch.get_rng_state(), before), "the generator of the user is left alone"


def test_seeds_give_different_deals():
    deals = {tuple(torch.cat(deal_samples([16, 16], 4, seed)).tolist()) for seed in [*range(20), 2**63 - 1]}
    assert len(deals) == 21


def test_who_is_dealt_where_is_uniform_and_pairs_of_neighbours_part():
    """Over many seeds every sample comes to every group alike, and two RoIs of one image rarely stay together."""
    deals = torch.stack([torch.cat(deal_samples([5, 0, 7], 3, seed)) for seed in range(3000)])
    for group in range(3):
        shares = (deals == group).double().mean(0)  # standard error 0.009
        assert float((shares - 1 / 3).abs().max()) < 0.04
    together = (deals[:, 1:] == deals[:, :-1]).double().mean(0)
    assert float((together - 3 / 11).abs().max()) < 0.04  # 4 of 12 are in a group: 3 of the other 11


@pytest.mark.parametrize(
    ("num_samples", "num_groups", "sizes"),
    [([10, 1, 1, 1], 4, [4, 3, 3, 3]), ([5, 0, 0, 0], 4, [2, 1, 1, 1]), ([1, 0], 3, [1, 0, 0]), ([0, 0], 2, [0, 0])],
)
def test_examples(num_samples, num_groups, sizes):
    assert torch.cat(deal_samples(num_samples, num_groups, 0)).bincount(minlength=num_groups).tolist() == sizes

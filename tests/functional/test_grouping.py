"""Which samples are normalized together: every one once, evenly, in as few groups as the size or a deal allows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bnext.functional import Groups, deal_samples, divide_parts, group_samples
from tests.strategies import seeds

NUM_DOMAINS = 3
compositions = st.lists(st.integers(0, NUM_DOMAINS - 1), min_size=1, max_size=20)


def number(num_sources, shares):
    """The mini-batch of each source: one for all, or one of each."""
    return (0,) * num_sources if shares else tuple(range(num_sources))


def members_of(grouping):
    """For each mini-batch the (feature, sample) pairs that are in it, in order."""
    found = {}
    for feature, parts in enumerate(grouping.parts):
        for sample, part in enumerate(parts):
            found.setdefault(grouping.mini_batches[part], []).append((feature, sample))
    return found


@given(compositions, st.integers(1, 25), st.booleans())
def test_groups_of_one_feature(domains, size, shares):
    grouping = group_samples((len(domains),), (tuple(domains),), number(NUM_DOMAINS, shares), size)
    (parts,) = grouping.parts
    assert [grouping.sources[part] for part in parts] == domains, "a part is of one domain"
    groups = members_of(grouping)
    assert sorted(pair for group in groups.values() for pair in group) == [(0, i) for i in range(len(domains))]
    assert sorted(groups) == list(range(len(groups))), "no group is empty"
    owners = {}
    for batch, group in groups.items():
        kinds = {None if shares else domains[sample] for _, sample in group}
        assert len(kinds) == 1, "a mini-batch is of one owner"
        owners.setdefault(kinds.pop(), []).append([sample for _, sample in groups[batch]])
    for owner, own in owners.items():
        total = len(domains) if shares else domains.count(owner)
        sizes = [len(group) for group in own]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert len(own) == -(-total // size), "as few as possible"
        ordered = [sample for group in sorted(own) for sample in group]
        assert ordered == sorted(ordered), "in their order"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 12), st.booleans())
def test_groups_of_several_features(counts, size, shares):
    """Levels: samples are cut within each feature, and the g-th groups are one mini-batch where levels share it."""
    grouping = group_samples(tuple(counts), tuple(range(len(counts))), number(len(counts), shares), size)
    if not any(counts):
        return
    alone = [group_samples((count,), (0,), (0,), size) for count in counts]
    for feature, count in enumerate(counts):
        own = [grouping.mini_batches[part] for part in grouping.parts[feature]]
        expected = [alone[feature].mini_batches[part] for part in alone[feature].parts[0]] if count else []
        assert [sorted(set(own)).index(batch) for batch in own] == expected
    for batch, group in members_of(grouping).items():
        features = [feature for feature, _ in group]
        assert shares or len(set(features)) == 1
        assert all(features.count(feature) <= size for feature in features), batch


@given(compositions, st.booleans())
def test_without_a_size_the_parts_are_the_domains(domains, shares):
    grouping = group_samples((len(domains),), (tuple(domains),), number(NUM_DOMAINS, shares))
    assert grouping.parts == (tuple(domains),)
    assert grouping.sources == tuple(range(NUM_DOMAINS)), "also those without samples: workers agree on the number"
    assert grouping.mini_batches == ((0,) * NUM_DOMAINS if shares else tuple(range(NUM_DOMAINS)))


def test_no_samples_at_all():
    for size in (None, 2):
        grouping = group_samples((0, 0), (0, 1), (0, 1), size)
        assert (grouping.mini_batches, grouping.sources) == ((0, 1), (0, 1))


@given(compositions, st.booleans(), st.integers(1, 4), st.data())
def test_parts_divided_by_groups_keep_domains_and_part_mini_batches(domains, shares, num_groups, data):
    numbers = data.draw(st.lists(st.integers(0, num_groups - 1), min_size=len(domains), max_size=len(domains)))
    whole = group_samples((len(domains),), (tuple(domains),), number(NUM_DOMAINS, shares))
    divided = divide_parts(whole, Groups(torch.tensor(numbers), num_groups))
    (parts,) = divided.parts
    assert len(divided.sources) == len(divided.mini_batches) == NUM_DOMAINS * num_groups, "also those without samples"
    assert [divided.sources[part] for part in parts] == domains
    batches = [divided.mini_batches[part] for part in parts]
    keys = [(group, None if shares else domain) for group, domain in zip(numbers, domains, strict=True)]
    for batch, key in zip(batches, keys, strict=True):
        assert [b == batch for b in batches] == [k == key for k in keys]
    assert set(divided.mini_batches) == set(range((1 if shares else NUM_DOMAINS) * num_groups)), "numbered from 0"


def test_parts_of_one_domain_are_divided_too():
    divided = divide_parts(group_samples((3,), (1,), (0, 1)), Groups(torch.tensor([1, 0, 1]), 2))
    assert divided.parts[0].tolist() == [3, 2, 3]
    assert (divided.mini_batches, divided.sources) == ((0, 1, 2, 3), (0, 0, 1, 1))


# ---- deals

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

"""Batches with shares of domains: exact, resumable, and the same for any number of workers."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnext.data.sampling.domain_batches import DomainBatchSampler
from tests.strategies import seeds

DOMAINS = ["day"] * 7 + ["night"] * 3 + ["rain"] * 5
KINDS = ["composed", "alternating", "random_domain"]
few = settings(max_examples=25, deadline=None)
ratios = st.tuples(*[st.integers(1, 4)] * 3)


def build(ratios, size, kind="composed", **options):
    options = {"seed": 3, **options}
    weights = dict(zip(("day", "night", "rain"), ratios, strict=False))
    domains = [domain for domain in DOMAINS if domain in weights]
    return DomainBatchSampler(domains, size, weights=weights, kind=kind, **options)


def take(number, *args, **options):
    return list(islice(build(*args, **options), number))


def count(batch):
    return Counter(DOMAINS[index] for _, index in batch)


@few
@given(ratios, st.integers(1, 3), st.integers(0, 10**6), seeds)
def test_every_composed_batch_has_exactly_its_ratios(ratios, times, start, seed):
    batches = take(3, ratios, times * sum(ratios), start_iteration=start, seed=seed)
    wanted = {domain: times * ratio for domain, ratio in zip(("day", "night", "rain"), ratios, strict=True)}
    assert all(count(batch) == wanted for batch in batches)


@few
@given(ratios, st.sampled_from(KINDS), st.integers(0, 40), st.sampled_from([1, 2]), seeds)
def test_a_later_start_gives_the_same_batches(ratios, kind, start, world_size, seed):
    settings = {"kind": kind, "seed": seed, "world_size": world_size, "rank": world_size - 1, "num_micro_batches": 2}
    whole = take(start + 5, ratios, 8, **settings)
    assert take(5, ratios, 8, start_iteration=start, **settings) == whole[start:]


@few
@given(ratios, st.sampled_from(KINDS), st.sampled_from([1, 2]), seeds)
def test_the_total_batch_does_not_depend_on_the_number_of_workers(ratios, kind, num_micro_batches, seed):
    settings = {"kind": kind, "seed": seed, "num_micro_batches": num_micro_batches}
    alone = take(6, ratios, 12, **settings)
    shards = [take(6, ratios, 12, rank=rank, world_size=3, **settings) for rank in range(3)]
    assert [sorted(sum(parts, [])) for parts in zip(*shards, strict=True)] == alone
    assert [position for batch in alone for position, _ in batch] == list(range(72))


@pytest.mark.parametrize("kind", KINDS)
def test_every_domain_has_its_own_epochs(kind):
    samples = sum(take(60, (2, 1, 1), 4, kind=kind), [])
    for domain, size in Counter(DOMAINS).items():
        indices = [index for _, index in samples if DOMAINS[index] == domain]
        epochs = [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
        assert len(epochs) > 5
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_domains_of_the_same_images_come_in_orders_of_their_own():
    """Else the clean and the dark form of a picture would always be in one batch."""
    sampler = DomainBatchSampler(["day", "night"] * 9, 2, weights={"day": 1, "night": 1}, kind="composed", seed=0)
    assert any(first[1] // 2 != second[1] // 2 for first, second in islice(sampler, 9))


def test_what_normalizes_together_is_of_one_domain():
    """Batches in turn; with accumulation micro-batches, of all workers at once."""
    assert [set(count(batch)) for batch in take(4, (1, 1), 4, "alternating")] == [{"day"}, {"night"}] * 2

    for rank in range(2):
        for batch in take(3, (1, 1), 8, "alternating", num_micro_batches=2, rank=rank, world_size=2):
            assert (set(count(batch[:2])), set(count(batch[2:]))) == ({"day"}, {"night"})


def test_ratios_that_fit_a_worker_are_exact_there():
    for rank in range(2):
        assert all(count(batch) == {"day": 3, "night": 1} for batch in take(5, (6, 2), 8, rank=rank, world_size=2))


def test_every_worker_comes_to_see_a_domain_with_one_image_in_a_batch():
    shards = [take(4, (3, 1), 4, rank=rank, world_size=2) for rank in range(2)]
    assert [[count(batch)["night"] for batch in batches] for batches in shards] == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_only_images_of_its_domain_stand_in_for_one():
    assert [DOMAINS[index] for index in build((1, 1, 1), 3).list_alike(8)] == ["night"] * 3

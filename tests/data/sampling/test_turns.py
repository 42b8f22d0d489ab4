"""Turns of domains: as often as their weights say, and the same from wherever one begins."""

from itertools import islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnext.data.sampling.turns import DrawnTurns, EvenTurns
from tests.strategies import seeds

few = settings(max_examples=30, deadline=None)
weights = st.lists(st.integers(1, 40) | st.integers(1, 10**6), min_size=1, max_size=5)


def take(turns, start, number):
    return list(islice(turns.follow(start), number))


@few
@given(weights, st.integers(1, 100))
def test_even_turns_stay_within_their_bound_at_all_times(weights, number):
    taken = take(EvenTurns(weights), 0, number)
    for n in range(1, number + 1):
        for domain, weight in enumerate(weights):
            share = weight / sum(weights)
            bound = 1 / 2 + share * (len(weights) - 2) / 2
            assert abs(taken[:n].count(domain) - n * share) <= bound + 1e-6


@few
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 10**6))
def test_even_turns_are_exact_in_every_round(weights, number):
    counts = take(EvenTurns(weights), number * sum(weights), sum(weights))
    assert [counts.count(domain) for domain in range(len(weights))] == weights


def test_equal_domains_come_in_turn():
    assert take(EvenTurns([5, 5, 5]), 0, 7) == [0, 1, 2, 0, 1, 2, 0]


@few
@given(weights, st.integers(0, 2500), st.sampled_from(["even", "drawn"]), seeds)
@example(weights=[36, 1, 1, 1, 1], start=22, kind="even", seed=0)  # one has a turn less than its share, rounded down
def test_any_turn_is_found_without_those_before(weights, start, kind, seed):
    turns = EvenTurns(weights) if kind == "even" else DrawnTurns(weights, seed)
    whole = take(turns, 0, start + 20)
    assert take(turns, start, 20) == whole[start:]
    assert turns.count_before(start) == [whole[:start].count(domain) for domain in range(len(weights))]


def test_drawn_turns_have_their_chances_and_follow_the_seed():
    first, second = (take(DrawnTurns([3, 1], seed), 0, 4000) for seed in (0, 1))
    assert first != second
    assert first.count(1) == pytest.approx(1000, abs=5 * 27.4)  # five standard deviations

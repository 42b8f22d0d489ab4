"""The arithmetic of pairs: when they are enough, their interval, and what becomes of a goal."""

import pytest

from bench.pairs import Estimate, Limits, Pairs, estimate_ratio, find_interval, judge_ratio, time_pairs


class Clock:
    """Gives the seconds that an arm says that it takes."""

    def time(self, step):
        return step()


def pairs_of(ours, other, **limits):
    """Run arms that take these seconds, one after the other."""
    ours, other = iter([9.0, 9.0, *ours]), iter([9.0, 9.0, *other])  # the first runs are not counted
    return time_pairs(lambda: next(ours), lambda: next(other), Clock(), Limits(**limits))


def is_narrow(pairs, number):
    estimate = estimate_ratio(Pairs(pairs.ours[:number], pairs.other[:number]))
    return estimate.high - estimate.low <= 0.05 * estimate.median


def test_pairs_end_as_soon_as_the_interval_is_narrow_and_five_pairs_later_still_is():
    pairs = pairs_of([1.0] * 60, [2.0] * 60, seconds=1e9)
    assert (len(pairs.ours), len(pairs.other), pairs.is_cut) == (16, 16, False)

    pairs = pairs_of([1.0, 2.0] * 7 + [1.0] * 46, [2.0, 1.0] * 7 + [2.0] * 46, seconds=1e9)
    narrow = [number for number in range(11, 61) if is_narrow(pairs, number)]
    assert narrow[0] + 5 == len(pairs.ours) > 16


def test_pairs_go_on_while_the_interval_is_wide_and_end_at_the_most():
    pairs = pairs_of([1.0, 2.0] * 40, [2.0, 1.0] * 40, seconds=1e9)
    assert (len(pairs.ours), pairs.is_cut) == (60, False)


def test_time_ends_pairs_but_never_before_the_least():
    for seconds, number in ((45.0, 16), (0.0, 11)):
        pairs = pairs_of([1.0, 2.0] * 40, [2.0, 1.0] * 40, seconds=seconds)
        assert (len(pairs.ours), pairs.is_cut) == (number, True)


def test_the_order_within_a_pair_alternates():
    order = []
    time_pairs(lambda: order.append("ours") or 1.0, lambda: order.append("other") or 1.0, Clock(), Limits(2, 2))
    assert order[4:] == ["ours", "other", "other", "ours"]


def test_a_ratio_is_of_pairs_and_its_interval_is_of_the_median():
    ours = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0]
    estimate = estimate_ratio(Pairs(ours, [3.0 * seconds for seconds in ours]))
    assert (estimate.median, estimate.lowest, estimate.highest, estimate.num_pairs) == (3.0, 3.0, 3.0, 11)

    low, high = find_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 100.0])
    assert (low, high) == (3.0, 9.0)  # by binomial weights of ranks: 3 to 9 of 11 with 95 %


@pytest.mark.parametrize(
    ("low", "high", "num_pairs", "verdict"),
    [
        (1.31, 1.60, 60, "met"),  # wide, and above
        (1.27, 1.31, 11, "met"),  # narrow, and reaches it
        (1.20, 1.40, 60, "not decided"),  # wide
        (1.26, 1.29, 11, "missed"),
        (0.90, 1.29, 60, "missed"),  # wide, and below
        (1.40, 1.41, 3, "not decided"),  # too few
    ],
)
def test_a_goal(low, high, num_pairs, verdict):
    estimate = Estimate((low + high) / 2, low, high, low, high, num_pairs)
    assert judge_ratio(estimate, 1.3) == verdict
    assert judge_ratio(estimate, None) == ""

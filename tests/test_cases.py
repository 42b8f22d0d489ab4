"""The table of cases: every two answers that go together are in some row of it."""

import itertools

from bnext.errors import ConfigError
from tests.cases import ANSWERS, list_answers, make_case


def find_pairs(answers):
    return set(itertools.combinations(answers.items(), 2))


def is_possible(answers):
    """Whether there is such a norm, and its sources are told apart by something."""
    has_own, sources = "own" in answers.values(), answers["sources"]
    if (sources == "none" and has_own) or (sources in ("one", "mixed") and not has_own):
        return False
    try:
        make_case(answers)
    except ConfigError:
        return False
    return True


def test_every_two_answers_that_go_together_are_in_some_row():
    possible = set()
    for values in itertools.product(*ANSWERS.values()):
        answers = dict(zip(ANSWERS, values, strict=True))
        if not find_pairs(answers) <= possible and is_possible(answers):
            possible |= find_pairs(answers)

    covered = set()
    for answers in list_answers():
        covered |= find_pairs(answers)
    assert len(list_answers()) <= 35
    assert possible - covered == set()

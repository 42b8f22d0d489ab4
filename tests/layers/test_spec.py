"""`NormSpec`: the six rows, and what it refuses."""

import dataclasses
import pickle
import re

import pytest

from bnext.errors import ConfigError
from bnext.layers import TABLE5_ROWS, NormSpec

PAPER = {  # mini-batch statistics, population statistics, affine: Wu and Johnson 2021, Table 5
    1: ("shared", "shared", "shared"),
    2: ("shared", "per_level", "shared"),
    3: ("per_level", "shared", "shared"),
    4: ("per_level", "per_level", "shared"),
    5: ("per_level", "shared", "per_level"),
    6: ("per_level", "per_level", "per_level"),
}


@pytest.mark.parametrize("row", PAPER)
def test_rows_are_the_papers(row):
    spec = NormSpec.from_table5_row(row, workers="all")
    assert (spec.statistics, spec.population, spec.affine) == PAPER[row]
    assert spec.workers == "all"
    assert spec.table5_row == row


def test_the_default_is_torchs_batch_norm():
    assert NormSpec().table5_row == 1
    assert (NormSpec().momentum, NormSpec().eps, NormSpec().workers) == (0.1, 1e-5, "one")


@pytest.mark.parametrize("population", ["shared", "per_level"])
def test_shared_statistics_with_own_affine_are_in_no_row(population):
    assert NormSpec(statistics="shared", population=population, affine="per_level").table5_row is None


@pytest.mark.parametrize("row", [0, 7, "1", None])
def test_unknown_row(row):
    with pytest.raises(ConfigError, match=r"row must be one of 1 to 6; got .* \(Table 5\)"):
        NormSpec.from_table5_row(row)


@pytest.mark.parametrize(
    ("field", "choices"),
    {
        "statistics": ("shared", "per_level", "per_domain", "per_level_and_domain"),
        "population": ("shared", "per_level", "per_domain", "per_level_and_domain", "none"),
        "affine": ("shared", "per_level", "per_domain", "per_level_and_domain", "none"),
        "training": ("mini_batch", "population", "renorm"),
        "average": ("moving", "cumulative"),
        "inference": ("population", "mini_batch"),
        "frozen": ("none", "statistics", "affine", "both"),
        "single_element": ("error", "population"),
    }.items(),
)
@pytest.mark.parametrize("value", ["other", "", None, "Shared", 1])
def test_unknown_answer_names_field_value_and_choices(field, choices, value):
    with pytest.raises(ConfigError) as error:
        NormSpec(**{field: value})
    listed = ", ".join(repr(choice) for choice in choices)
    assert str(error.value).startswith(f"{field} must be one of {listed}; got {value!r} (NormSpec). ")


@pytest.mark.parametrize(
    ("field", "values", "rule"),
    [
        ("workers", ["other", "", None, 0, -1, 2.0, True, "2"], "'one', 'node', 'all', or a number of workers"),
        ("normalization_batch_size", [0, -1, 2.5, True, "2"], "1 or more, or None for the whole batch"),
        ("r_max", [0.9, 0, -1, float("nan")], "1 or more"),
        ("d_max", [-0.1, float("nan")], "0 or more"),
        ("momentum", [0, -0.1, 1.5, float("nan")], "above 0 and at most 1"),
        ("eps", [0, -1e-5, float("nan"), float("inf")], "above 0"),
    ],
)
def test_out_of_range_names_field_value_and_rule(field, values, rule):
    for value in values:
        with pytest.raises(ConfigError) as error:
            NormSpec(**{field: value})
        message = str(error.value)
        assert message.startswith(f"{field} must be ")
        assert f"{rule}" in message
        assert f"; got {value!r} (NormSpec). " in message
        assert message.endswith(".")


NAMES = ("day", "night")
WITHOUT_POPULATION = {"population": "none", "inference": "mini_batch"}
# Answers, and the field that the error names.
CONTRADICTIONS = [
    ({"affine": "per_domain"}, "domains"),
    ({"domains": NAMES}, "domains"),
    ({"affine": "per_level", "domains": NAMES}, "domains"),
    ({"affine": "per_domain", "domains": NAMES, "fallback_domain": "fog"}, "fallback_domain"),
    ({"fallback_domain": "fog"}, "fallback_domain"),
    ({"population": "none"}, "inference"),
    ({**WITHOUT_POPULATION, "training": "population"}, "training"),
    ({**WITHOUT_POPULATION, "training": "renorm"}, "training"),
    ({**WITHOUT_POPULATION, "frozen": "statistics"}, "frozen"),
    ({**WITHOUT_POPULATION, "frozen": "both"}, "frozen"),
    ({**WITHOUT_POPULATION, "single_element": "population"}, "single_element"),
    ({"affine": "none", "frozen": "affine"}, "frozen"),
    ({"affine": "none", "frozen": "both"}, "frozen"),
    ({"normalization_batch_size": 2, "workers": "all"}, "normalization_batch_size"),
    ({"normalization_batch_size": 2, "workers": 2}, "normalization_batch_size"),
    ({"normalization_batch_size": 2, "training": "population"}, "normalization_batch_size"),
]


@pytest.mark.parametrize(("answers", "field"), CONTRADICTIONS)
def test_contradictions_are_refused_by_field_and_value(answers, field):
    with pytest.raises(ConfigError, match=rf"^{field} must .*got .*\(NormSpec\)\. ") as error:
        NormSpec(**answers)
    assert repr(getattr(NormSpec(), field)) in str(error.value) or repr(answers.get(field)) in str(error.value)


@pytest.mark.parametrize(
    "answers",
    [
        {"normalization_batch_size": 2, "workers": 1},
        {"normalization_batch_size": 2, "training": "renorm"},
        {"workers": 7},
        {"r_max": 1, "d_max": 0},
        {"r_max": float("inf"), "d_max": float("inf")},
        {"momentum": 1},
        {"affine": "none", "frozen": "statistics"},
        {"population": "none", "inference": "mini_batch", "frozen": "affine"},
        {"statistics": "per_domain", "domains": NAMES, "fallback_domain": "day"},
        {"population": "per_level"},
    ],
)
def test_what_is_sensible_is_accepted(answers):
    spec = NormSpec(**answers)
    assert {name: getattr(spec, name) for name in answers} == answers


@pytest.mark.parametrize(
    ("answers", "has_levels", "has_domains"),
    [
        ({}, False, False),
        ({"affine": "none"}, False, False),
        ({"population": "per_level"}, True, False),
        ({"affine": "per_domain", "domains": NAMES}, False, True),
        ({"statistics": "per_level", "affine": "per_domain", "domains": NAMES}, True, True),
        ({"population": "per_level_and_domain", "domains": NAMES}, True, True),
    ],
)
def test_what_is_told_apart(answers, has_levels, has_domains):
    spec = NormSpec(**answers)
    assert (spec.has_levels, spec.has_domains) == (has_levels, has_domains)


@pytest.mark.parametrize("frozen", ["none", "statistics", "affine", "both"])
def test_what_is_frozen(frozen):
    spec = NormSpec(frozen=frozen)
    assert spec.has_frozen_statistics == (frozen in ("statistics", "both"))
    assert spec.has_frozen_affine == (frozen in ("affine", "both"))


def test_every_field_is_described():
    described = NormSpec.__doc__.partition("Args:")[2].partition("Raises:")[0]
    for field in dataclasses.fields(NormSpec):
        assert re.search(rf"^ {{8}}(\w+, )?{field.name}(, \w+)?:", described, re.MULTILINE), field.name


def test_domains_per_domain_are_in_no_row():
    assert NormSpec(statistics="per_domain", domains=NAMES).table5_row is None
    assert NormSpec(affine="none").table5_row is None


def test_a_spec_is_frozen_hashable_and_pickles():
    spec = NormSpec.from_table5_row(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.momentum = 0.5
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({NormSpec.from_table5_row(row) for row in TABLE5_ROWS}) == 6


def test_replace_checks_too():
    assert NormSpec.from_table5_row(4).replace(affine="per_level").table5_row == 6
    with pytest.raises(ConfigError, match="affine"):
        NormSpec().replace(affine="mine")


def test_domains_may_come_as_a_list_and_never_as_one_string():
    own = {"population": "per_domain"}
    assert NormSpec(domains=["day", "night"], **own) == NormSpec(domains=("day", "night"), **own)
    with pytest.raises(ConfigError, match=r"domains must be a sequence of names; got 'day'"):
        NormSpec(domains="day", **own)


@pytest.mark.parametrize("name", ["momentum", "eps", "r_max", "d_max"])
@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_numbers_are_numbers(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be a number"):
        NormSpec(**{name: value})


def test_torchs_momentum_none_is_pointed_to_the_cumulative_average():
    with pytest.raises(ConfigError, match="average='cumulative'"):
        NormSpec(momentum=None)


@pytest.mark.parametrize("domains", [("day", "day"), (1, 2), ("day", "")])
def test_domains_are_distinct_names(domains):
    with pytest.raises(ConfigError, match="domains must be distinct names"):
        NormSpec(population="per_domain", domains=domains)

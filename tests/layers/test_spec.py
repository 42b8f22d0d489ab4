"""`NormSpec`: the six rows, and what it refuses."""

import dataclasses
import pickle

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


@pytest.mark.parametrize("field", ["statistics", "population", "affine", "workers"])
@pytest.mark.parametrize("value", ["other", "", None, "Shared"])
def test_unknown_answer_names_field_value_and_choices(field, value):
    choices = ("one", "node") if field == "workers" else ("shared", "per_level")
    with pytest.raises(ConfigError) as error:
        NormSpec(**{field: value})
    assert str(error.value).startswith(f"{field} must be one of {choices[0]!r}, {choices[1]!r}; got {value!r}")


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ConfigError, match="momentum must be above 0 and at most 1"):
        NormSpec(momentum=momentum)


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan")])
def test_eps_out_of_range(eps):
    with pytest.raises(ConfigError, match="eps must be above 0"):
        NormSpec(eps=eps)


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

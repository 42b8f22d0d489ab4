import time

import pytest
import torch
from torch import nn

from bnext import BatchNorm2d, CycleBatchNormList, LevelBatchNorm2d, NormSpec, diagnose
from bnext.diagnostics.collecting.read_norms import read_norms
from bnext.diagnostics.collecting.read_state import collect_state_facts, read_state_dict
from bnext.diagnostics.diagnose import examine_facts
from bnext.surgery.convert_state import collect_norm_specs


def read(state, specs=None):
    norms, odd = read_state_dict(state, specs)
    assert not odd
    return norms


def list_owners(norm):
    return [one.owner for one in norm.populations], [one.owner for one in norm.affines]


def test_says_of_a_models_norms_what_the_model_says():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8, affine=False)))
    model(torch.randn(2, 3, 4, 4))

    norms, expected = read(model.state_dict()), read_norms(model)

    assert [norm.path for norm in norms] == [norm.path for norm in expected] == ["1", "2.0"]
    for norm, other in zip(norms, expected, strict=True):
        (population,), (right,) = norm.populations, other.populations
        assert torch.equal(population.mean, right.mean)
        assert torch.equal(population.var, right.var)
        assert population.num_updates == right.num_updates == 1
        assert len(norm.affines) == len(other.affines)


@pytest.mark.parametrize("row", range(1, 7))
@pytest.mark.parametrize("has_specs", [True, False])
def test_levels_are_parts_of_one_norm(row, has_specs):
    model = nn.Module()
    model.conv, model.norm = nn.Conv2d(3, 4, 1), LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(row))

    (norm,) = read(model.state_dict(), collect_norm_specs(model) if has_specs else None)

    (expected,) = read_norms(model)
    assert norm.path == "norm"
    assert list_owners(norm) == list_owners(expected)
    assert norm.record.population == expected.record.population
    assert norm.record.affine == expected.record.affine
    assert not has_specs or norm.record.statistics == expected.record.statistics


def test_a_list_of_norms_under_one_affine_is_one_norm_and_a_list_of_layers_is_none():
    numbered = nn.Sequential(nn.Conv2d(3, 4, 1), CycleBatchNormList(2, nn.BatchNorm2d, num_features=4))
    (norm,) = read(numbered.state_dict())
    assert list_owners(norm) == (["0", "1"], [""])

    layers = nn.ModuleDict({"norms": nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])})
    assert [norm.path for norm in read(layers.state_dict())] == ["norms.0", "norms.1"]
    block = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)})
    assert [norm.path for norm in read(block.state_dict())] == ["bn1", "bn2"]


def test_a_spec_says_eps_and_momentum_and_one_that_is_none_is_passed_over():
    model = nn.Sequential(BatchNorm2d(4, NormSpec(eps=1e-3, momentum=0.02, frozen="statistics")))
    specs = collect_norm_specs(model)

    (norm,) = read(model.state_dict(), specs)
    assert (norm.record.eps, norm.record.momentum, norm.record.frozen) == (1e-3, 0.02, "statistics")
    for wrong in ({"0": {"eps": -1}}, {"0": {"colour": 1}}, {"0": 3}):
        (norm,) = read(model.state_dict(), wrong)
        assert norm.record.eps == 1e-5


def test_a_norm_that_is_the_whole_state():
    (norm,) = read(nn.BatchNorm2d(4).state_dict())

    assert norm.path == ""
    assert norm.record.num_features == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_numbers_of_any_kind(dtype):
    state = {key: value.to(dtype) for key, value in nn.Sequential(nn.BatchNorm2d(4)).state_dict().items()}

    (norm,) = read(state)

    assert norm.populations[0].var.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running_var", torch.ones(4, 1, 1)),
        ("running_var", torch.ones(3)),
        ("running_var", torch.ones(0)),
        ("running_var", torch.ones(4, dtype=torch.complex64)),
        ("running_var", torch.ones(4, device="meta")),
        ("running_mean", torch.ones(4).to_sparse()),
        ("num_batches_tracked", torch.ones(3)),
        ("weight", torch.ones(3)),
    ],
)
def test_what_cannot_be_a_norms_state_is_said_and_hides_no_other_norm(name, value):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].running_var[0] = -1
    state = {**model.state_dict(), f"0.{name}": value}

    diagnosis = examine_facts(collect_state_facts(state))

    assert [finding.code for finding in diagnosis.findings] == ["BN011"]
    assert diagnosis.findings[0].evidence.layers == ("1",)
    assert any(f"0.{name}" in failure for failure in diagnosis.failures)
    assert not any("BN0" in failure for failure in diagnosis.failures)


def test_names_with_markup_in_them_stay_as_they_are():
    state = {f"<b>*_[x](y).{key}": value for key, value in nn.BatchNorm2d(4).state_dict().items()}

    assert read(state)[0].path == "<b>*_[x](y)"


def test_a_state_without_norms_says_so():
    diagnosis = examine_facts(collect_state_facts(nn.Linear(3, 4).state_dict(), "a.pth"))

    assert not diagnosis.findings
    assert "No norm" in str(diagnosis)


def test_diagnose_takes_a_state_dict():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].running_var[0] = -1

    assert [finding.code for finding in diagnose(model.state_dict()).findings] == ["BN011"]


def test_time_grows_with_the_number_of_norms_alone():
    state = {f"{index}.{key}": value for index in range(1000) for key, value in nn.BatchNorm2d(4).state_dict().items()}

    start = time.process_time()
    diagnosis = examine_facts(collect_state_facts(state))

    assert len(diagnosis.facts.norms) == 1000
    assert time.process_time() - start < 3

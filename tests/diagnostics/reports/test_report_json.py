"""The report as JSON: as its schema says, whatever the model is called and whatever its numbers are."""

import copy
import dataclasses
import json

import torch
from torch import nn

import bnext
from bnext import LevelBatchNorm2d
from bnext.diagnostics import diagnose
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.findings import Remedy
from bnext.diagnostics.reports.report_json import format_json, read_schema
from tests.diagnostics.reports.json_schema import find_faults
from tests.diagnostics.reports.reported import diagnose_ill, diagnose_nasty, find_something, place_in


def read(diagnosis):
    """The report as a strict reader takes it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(format_json(diagnosis), parse_constant=refuse)


def test_it_is_as_the_schema_says():
    levels = nn.ModuleDict({"a": LevelBatchNorm2d(4, ("p3", "p4")), "b": nn.GroupNorm(2, 4), "c": nn.SyncBatchNorm(4)})
    frozen = nn.BatchNorm2d(3).eval()
    models = [
        nn.Linear(1, 1),
        levels,
        nn.Sequential(frozen),
        nn.BatchNorm2d(3, track_running_stats=False, affine=False),
    ]
    models += [nn.LazyBatchNorm2d(), nn.BatchNorm2d(3, device="meta"), nn.BatchNorm1d(3, momentum=None)]

    diagnoses = [diagnose_ill(), diagnose_nasty(), *map(diagnose, models)]
    diagnoses.append(place_in(diagnoses[0], "a.yaml", "b.pth"))
    for diagnosis in diagnoses:
        assert not find_faults(read_schema(), read(diagnosis))
        assert read(diagnosis) == diagnosis.as_dict()


def test_the_schema_would_tell():
    report = read(diagnose_ill())
    broken = [copy.deepcopy(report) for _ in range(4)]
    del broken[0]["findings"][0]["remedy"]["text"]
    broken[1]["findings"][0]["severity"] = "fatal"
    broken[2]["inventory"][0]["together"] = [1]
    broken[3]["schema"] = "bnext-doctor/2"

    assert all(find_faults(read_schema(), value) for value in broken)


def test_a_finding_has_all_of_its_parts():
    diagnosis = diagnose_ill()
    first, evidence = read(diagnosis)["findings"][0], diagnosis.findings[0].evidence

    assert first["code"] == "BN001"
    assert first["layers"] == ["tower.1"]
    assert first["evidence"] == evidence.text
    assert first["numbers"]["calls"] == 2.0
    assert first["remedy"]["call"] == evidence.remedy.call
    assert first["page"] == "doctor-codes.html#bn001"
    assert read(diagnosis)["counts"] == {"error": 2, "warning": 0, "note": 0}
    assert read(diagnosis)["versions"] == {"bnext": bnext.__version__, "torch": torch.__version__}


def test_the_inventory_counts_every_norm_once():
    model = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(8), nn.GroupNorm(2, 4)])
    model.append(model[0])

    groups = diagnose(model).as_dict()["inventory"]
    assert [group["layers"] for group in groups] == [["0", "1"], ["2"]]
    assert groups[0]["channels"] == [4, 8]
    assert groups[0]["num_parameters"] == 24
    assert groups[0]["num_updates"] == [0, 0]


def test_calls_and_elements_are_those_of_the_data():
    group = diagnose_ill().as_dict()["inventory"][0]

    assert group["calls"] == 2
    assert group["together"] == [2, 2]
    assert group["elements"] == [2 * 4 * 4, 2 * 8 * 8]


def test_numbers_that_are_not_finite_are_null_and_values_of_keys_are_of_json():
    remedy = Remedy("Set it.", {"A": (1, 2), "B": float("nan"), "C": torch.float32, "D": "x"})
    numbers = {"z": float("inf"), "count": 3}
    diagnosis = find_something(collect_facts(nn.BatchNorm2d(3)), "note", remedy=remedy, numbers=numbers)

    finding = read(diagnosis)["findings"][0]
    assert finding["numbers"] == {"z": None, "count": 3.0}
    assert finding["remedy"]["keys"] == {"A": [1, 2], "B": None, "C": "torch.float32", "D": "x"}


def test_the_same_diagnosis_gives_the_same_text():
    assert format_json(diagnose_ill()) == format_json(diagnose_ill())


def test_what_failed_is_in_it():
    facts = dataclasses.replace(collect_facts(nn.BatchNorm2d(3)), failures=("No data.",))

    assert read(find_something(facts))["failures"] == ["No data."]

"""The report as SARIF: the structure that code scanning asks for, where findings are, and how they are told apart."""

import dataclasses
import json
from pathlib import Path

import pytest
from torch import nn

from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.findings import Remedy
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_sarif import describe_sarif, format_sarif
from tests.diagnostics.reports.json_schema import find_faults
from tests.diagnostics.reports.reported import diagnose_ill, diagnose_nasty, find_something, place_in

SCHEMA = json.loads(Path(__file__).with_name("sarif.schema.json").read_text())
YAML = """# A config.
MODEL:
  WEIGHTS: ""
  RETINANET:
    NORM: BN
  BNEXT: {RETINANET: {STATISTICS: shared}}
SOLVER: {IMS_PER_BATCH: 2}
"""


def get_results(diagnosis):
    return describe_sarif(diagnosis)["runs"][0]["results"]


def get_line(diagnosis):
    return get_results(diagnosis)[0]["locations"][0]["physicalLocation"]["region"]["startLine"]


def make_facts(number=1):
    return collect_facts(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(number))))


def test_it_has_the_structure_of_sarif(tmp_path):
    failed = dataclasses.replace(make_facts(), failures=("A forward failed.",))
    diagnoses = [diagnose_ill(), diagnose_nasty(), find_something(failed, "error", "warning", "note")]
    diagnoses += [place_in(diagnosis, tmp_path / "a b#c.yaml") for diagnosis in diagnoses]

    for diagnosis in diagnoses:
        log = json.loads(format_sarif(diagnosis, status=1))
        assert not find_faults(SCHEMA, log)
        assert log["runs"][0]["invocations"][0]["exitCode"] == 1


def test_every_check_is_a_rule_to_which_results_point():
    run = describe_sarif(find_something(make_facts(), "error", "warning", "note"))["runs"][0]

    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(find_checks())
    assert [rules[result["ruleIndex"]]["id"] for result in run["results"]] == ["BN001"] * 3
    assert [result["level"] for result in run["results"]] == ["error", "warning", "note"]


def test_what_could_not_be_found_out_is_a_notification():
    facts = dataclasses.replace(make_facts(), failures=("A forward failed.",))

    (invocation,) = describe_sarif(find_something(facts))["runs"][0]["invocations"]
    assert invocation["toolExecutionNotifications"] == [{"level": "warning", "message": {"text": "A forward failed."}}]


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("MODEL.RETINANET.NORM", 5),
        ("MODEL.BNEXT.RETINANET.STATISTICS", 6),
        ("MODEL.BNEXT.RETINANET.POPULATION", 6),  # the node that would have it
        ("SOLVER.IMS_PER_BATCH", 7),
        ("TEST.AUG.ENABLED", 1),
    ],
)
def test_a_finding_is_at_the_key_that_mends_it(key, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my config.yaml").write_text(YAML)
    diagnosis = place_in(find_something(make_facts(), "error", remedy=Remedy("Set it.", {key: 1})), "my config.yaml")

    assert get_line(diagnosis) == line
    (location,) = get_results(diagnosis)[0]["locations"]
    assert location["physicalLocation"]["artifactLocation"] == {"uri": "my%20config.yaml"}
    assert [layer["fullyQualifiedName"] for layer in location["logicalLocations"]] == ["0"]


def test_a_finding_without_keys_is_at_the_key_that_names_its_norms(tmp_path):
    facts = make_facts()
    facts = dataclasses.replace(facts, norms=(dataclasses.replace(facts.norms[0], norm_key="MODEL.RETINANET.NORM"),))
    file = tmp_path / "a.yaml"
    file.write_text(YAML)

    assert get_line(place_in(find_something(facts, "error", remedy=Remedy("Call it.", call="f()")), file)) == 5


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n- 2", "!!python/object:os.system {}", "x: \x00"])
def test_a_file_that_is_no_config_gives_its_first_line(text, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(text)

    assert get_line(place_in(find_something(make_facts(), "error", remedy=Remedy("Set it.", {"A.B": 1})), file)) == 1


def test_the_file_is_the_checkpoint_where_there_is_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diagnosis = find_something(make_facts(), "error")

    def find_uri(weights):
        location = get_results(place_in(diagnosis, "to_be_named.yaml", weights, kind="checkpoint"))[0]["locations"][0]
        return location.get("physicalLocation", {}).get("artifactLocation", {}).get("uri")

    assert find_uri("out/model.pth") == "out/model.pth"
    assert find_uri("/elsewhere/model.pth") == "file:///elsewhere/model.pth"
    assert find_uri("https://x.org/model.pth") == "https://x.org/model.pth"
    assert find_uri("") is None


def test_a_finding_is_known_again_when_its_numbers_have_changed():
    facts = make_facts(2)

    def identify(*severities, **changes):
        results = get_results(find_something(facts, *severities, **changes))
        return [result["partialFingerprints"]["primaryLocationLineHash"] for result in results]

    (first,) = identify("error", text="3 of 4")
    assert identify("warning", text="4 of 4") == [first]
    assert identify("error", layers=("0",)) != [first]
    assert len(set(identify("error", "error"))) == 2


def test_layers_are_as_many_as_code_scanning_shows():
    (result,) = get_results(find_something(make_facts(150), "error"))

    assert len(result["locations"][0]["logicalLocations"]) == 100
    assert result["properties"]["layers"] == 150

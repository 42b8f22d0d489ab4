"""The report for a terminal: short, worst first, what is to be pasted unbroken, and at the end the line to run."""

import dataclasses
import re

import pytest
import torch
import torchvision
from torch import nn

from bnext.diagnostics import diagnose
from bnext.diagnostics.diagnose import collect_facts, examine_facts
from bnext.diagnostics.facts import Origin, WeightsFacts
from bnext.diagnostics.findings import Remedy
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_text import explain_check, find_next, format_text, list_checks
from tests.diagnostics.reports.reported import diagnose_ill, diagnose_nasty, find_something, place_in


def make_facts(number=1):
    return collect_facts(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(number))))


def test_findings_come_worst_first_with_all_that_is_known_of_them():
    text = format_text(find_something(make_facts(3), "error", "warning"))

    lines = text.splitlines()
    assert lines[0] == "Sequential, 3 norms: 1 error, 1 warning."
    assert "".join(re.findall(r"^(ERROR|WARNING) BN001", text, flags=re.MULTILINE)) == "ERRORWARNING"
    for label, words in {"layers": "{0-2} (3 norms)", "seen": "Seen.", "remedy": "Do it."}.items():
        assert f"  {label:9}{words}" in lines
    assert find_checks()["BN001"].source.split()[0] in text
    assert "  more     bnext doctor --explain BN001" in lines
    assert lines[-2:] == ["Next:", "    bnext doctor --explain BN001"], "there is nothing to paste"


def test_it_keeps_to_the_width_of_the_terminal_but_for_what_is_pasted():
    command, call = "bnext train " + "MODEL.FPN.NORM SyncBN " * 10, "for norm in norms:\n    " + "norm.train() " * 20
    remedy = Remedy("Do this. " * 30, {"MODEL.FPN.NORM": "a b"}, command.strip(), call)
    diagnosis = find_something(make_facts(), "error", text="Seen. " * 60, remedy=remedy)

    lines = format_text(diagnosis, width=60).splitlines()
    long = [line.strip() for line in lines if len(line) > 60]
    pasted = [command.strip(), call.split("\n")[1].strip()]
    assert set(long) == set(pasted)
    assert "             MODEL.FPN.NORM 'a b'" in lines
    assert lines[-2:] == ["Next:", f"    {command.strip()}"]


def test_a_long_path_stays_whole():
    path = "backbone." * 20 + "norm-of-res2"

    lines = format_text(find_something(make_facts(), "error", layers=(path,)), width=60).splitlines()
    assert path in [line.strip() for line in lines]


def test_notes_are_a_line_each_unless_all_is_asked_for():
    diagnosis = find_something(make_facts(), "note", "note", text="Long. " * 100)
    assert format_text(diagnosis, is_complete=True).count("NOTE BN001") == 2

    lines = format_text(diagnosis, width=80).splitlines()
    notes = [line for line in lines if line.startswith("note ")]
    assert len(notes) == 2
    assert max(map(len, notes)) <= 80


def test_the_last_line_tries_the_keys_of_the_remedy():
    diagnosis = find_something(make_facts(), "warning", remedy=Remedy("Set it.", {"MODEL.FPN.NORM": "GN"}))

    last = format_text(place_in(diagnosis, "a.yaml", "b.pth")).splitlines()[-1]
    command, pairs = "bnext doctor --config-file a.yaml", "MODEL.WEIGHTS b.pth SEED 1 MODEL.FPN.NORM GN"
    assert last.strip() == f"{command} {pairs}"


def test_what_sees_more_is_what_to_run_where_nothing_is_wrong():
    norm = nn.BatchNorm2d(4)
    batches = [torch.randn(32, 4, 8, 8)]

    static, forward = find_something(collect_facts(norm)), find_something(diagnose(norm, batches).facts)
    full = find_something(diagnose(norm, batches, depth="full").facts)
    assert [find_next(diagnosis) for diagnosis in (static, forward, full)] == [
        "bnext.diagnose(model, data)",
        'bnext.diagnose(model, data, depth="full")',
        "",
    ]
    assert find_next(place_in(static, "a.yaml")) == "bnext doctor --config-file a.yaml --data SEED 1"
    assert find_next(place_in(forward, "a.yaml")) == "bnext doctor --config-file a.yaml --depth full SEED 1"


def test_what_is_healthy_is_one_line_that_says_what_was_looked_at():
    with torch.device("meta"):
        model = torchvision.models.resnet50()

    lines = str(diagnose(model)).splitlines()
    assert lines[0] == "ResNet, 53 norms: nothing wrong was found."
    assert "without data" in lines[1]
    assert "More is seen with data" in lines[1]
    assert lines[-1].strip() == "bnext.diagnose(model, data)"
    assert len(lines) <= 24  # a screen


def test_the_inventory_says_what_differs_in_each_group_and_what_is_equal_once():
    model = nn.ModuleDict({"live": nn.BatchNorm2d(4, eps=1e-3), "still": nn.BatchNorm2d(8, eps=1e-3)})
    model["still"].eval()

    text = format_text(diagnose(model), width=1000)
    assert "All norms: at inference: population; affine: shared; eps: 0.001." in text
    assert (
        "1 BatchNorm2d: live\n    in training: all samples of a worker; channels: 4; momentum: 0.1; updates: 0" in text
    )
    assert "in evaluation mode within a model in training mode" in text


@pytest.mark.parametrize("is_complete", [False, True])
def test_hundreds_of_groups_are_a_screen_unless_all_are_asked_for(is_complete):
    model = nn.ModuleList(nn.BatchNorm2d(4, eps=1e-5 * (1 + number)) for number in range(300))

    text = format_text(diagnose(model), is_complete=is_complete)
    assert ("more groups" not in text) == is_complete
    assert (len(text.splitlines()) > 300) == is_complete
    assert len(text.splitlines()) < 60 or is_complete


def test_names_do_not_break_lines_or_reach_the_terminal():
    text = format_text(diagnose_nasty())

    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert "<script>alert(1)</script>\\x1b[31m\\n" in text


def test_colors_are_codes_around_severities_alone():
    diagnosis = diagnose_ill()

    colored = format_text(diagnosis, has_colors=True)
    assert colored.count("\x1b[1;31mERROR\x1b[0m") == 2
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == format_text(diagnosis) == str(diagnosis)


def test_what_could_not_be_found_out_is_said():
    facts = dataclasses.replace(make_facts(), failures=("A forward failed: RuntimeError: no\nwonder",))

    assert "not known: A forward failed: RuntimeError: no\\nwonder" in str(examine_facts(facts))


def test_a_model_without_norms_and_an_empty_one_are_reported():
    for model in (nn.Linear(2, 2), nn.Sequential()):
        assert "There is no norm to look at." in str(diagnose(model))
    assert "the model itself" in str(diagnose(nn.BatchNorm2d(3)))


def test_a_diagnosis_shows_itself_in_a_line():
    assert repr(diagnose_ill()) == "<Diagnosis of Head, 1 norm: 2 errors>"


def test_weights_that_were_not_read_and_a_file_alone_are_said():
    facts = dataclasses.replace(make_facts(), weights=WeightsFacts("detectron2://a.pkl"))
    assert "detectron2://a.pkl was not read." in str(examine_facts(facts))

    alone = dataclasses.replace(make_facts(), origin=Origin("checkpoint", "my.yaml", weights="my model.pth"))
    text = str(examine_facts(alone))
    assert "Looked at: a file alone;" in text
    assert text.endswith("bnext doctor --config-file my.yaml --data MODEL.WEIGHTS 'my model.pth'")


def test_forwards_are_counted_as_calls():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, norm)

    assert "calls per forward: 2" in str(diagnose(model, [torch.randn(2, 3, 4, 4)]))


@pytest.mark.parametrize("check", find_checks().values(), ids=lambda check: check.code)
def test_every_check_is_listed_and_explained(check):
    assert f"{check.code}  {check.depth}" in list_checks([check])

    text = explain_check(check, width=72)
    assert check.page in text
    assert check.source.split(",")[0] in " ".join(text.split())  # also where nobody has measured a cost
    assert max(map(len, text.splitlines())) <= 72 or "`" in text

"""`bnext doctor`: the report in four forms, where it is asked for, and an exit status for CI."""

import json

import pytest
import torch
from torch import nn

from bnext.cli.main import main
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_json import read_schema
from tests import tiny
from tests.diagnostics.reports.json_schema import find_faults

# Its head has per-level statistics in training and one population: BN001.
ILL = ("--config-file", str(tiny.CONFIG))
HEALTHY = (*ILL, "MODEL.BNEXT.RETINANET.POPULATION", "per_level", "MODEL.BNEXT.RETINANET.AFFINE", "shared")


def run(*words):
    return main(["doctor", *map(str, words)])


def test_the_first_finding_and_what_to_run(capsys):
    assert run(*ILL) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("RetinaNet, ")
    assert next(line for line in lines if line.startswith("ERROR")).split()[1] == "BN001"
    assert lines[-2] == "Next:"
    assert lines[-1].startswith("    bnext ")
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ((*ILL, "--fail-on", "error"), 1),
        ((*ILL, "--fail-on", "warning", "--format", "json"), 1),
        ((*HEALTHY, "--fail-on", "error"), 0),
    ],
)
def test_the_status_says_whether_there_is_such_a_finding(words, status, capsys):
    assert run(*words) == status


def test_the_output_is_json_and_nothing_else(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"print('code of a config')\n{tiny.LAZY.read_text()}")

    assert run("--config-file", config, "--format", "json") == 0
    said = capsys.readouterr()
    assert not find_faults(read_schema(), json.loads(said.out))
    assert "code of a config" in said.err


@pytest.mark.parametrize("form", ["text", "json", "sarif", "html"])
def test_a_checkpoint_alone_is_reported_in_every_form(form, tmp_path, capsys):
    file = tmp_path / "model.pth"
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()}, file)

    assert run(file, "--format", form) == 0
    said = capsys.readouterr().out
    if form == "json":
        assert not find_faults(read_schema(), json.loads(said))
        assert json.loads(said)["origin"]["weights"] == str(file)


def test_a_model_must_be_named(capsys):
    assert run() == 2
    assert capsys.readouterr().err.startswith("error: doctor must be told of a model")


@pytest.mark.parametrize(("ending", "begin"), [(".json", "{"), (".sarif", "{"), (".html", "<!"), (".txt", "Retina")])
def test_the_ending_of_the_output_says_its_form(ending, begin, tmp_path, capsys):
    output = tmp_path / f"report{ending}"

    assert run(*ILL, "--output", output) == 0
    assert output.read_text().startswith(begin)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    said = capsys.readouterr()
    assert not said.out
    assert "1 error" in said.err
    assert str(output) in said.err


def test_the_status_stands_in_the_sarif(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)

    assert run("--config-file", "tests/tiny.yaml", "--output", tmp_path / "a.sarif", "--fail-on", "error") == 1
    (log,) = json.loads((tmp_path / "a.sarif").read_text())["runs"]
    assert log["invocations"][0]["exitCode"] == 1
    location = log["results"][0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "tests/tiny.yaml"
    line = location["region"]["startLine"] - 1
    assert "BNEXT" in tiny.CONFIG.read_text().splitlines()[line]


@pytest.mark.parametrize("name", ["missing/a.json", "a.yaml", "a", "folder.json", "model.pth"])
def test_an_output_that_cannot_be_is_refused_before_the_model_is_built(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr("bnext.cli.doctor.examine_detector", None)

    assert run(*ILL, "--output", tmp_path / name) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --output must ")
    assert said.count("\n") == 1


def test_a_disk_that_refuses_is_one_line_and_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    output = tmp_path / "a.json"
    output.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", str(output))))

    assert run(*ILL, "--output", output) == 2
    assert capsys.readouterr().err.startswith("error: the file ")
    assert output.read_text() == "before"


def test_checks_are_listed_and_explained_without_a_config(capsys):
    assert run("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(find_checks())

    assert run("--explain", "bn001") == run("--explain", "repeated-calls") == 0
    assert capsys.readouterr().out.count("BN001 repeated-calls") == 2

    assert run("--explain", "BN0O1") == 2
    assert "Did you mean 'BN0" in capsys.readouterr().err


def test_colors_are_for_terminals_without_no_color(capsys, monkeypatch):
    monkeypatch.setattr("bnext.cli.doctor_report.is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")

    run(*ILL)
    out = capsys.readouterr().out
    assert "\x1b[1;31mERROR\x1b[0m BN001" in out
    monkeypatch.setenv("NO_COLOR", "1")
    run(*ILL)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines() if line.startswith(("ERROR", "  seen"))) <= 60

"""The page of benchmarks shows the committed results."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.record import BEGIN, END, read_record
from bnext.errors import BNextError
from tests.docs.pages import ROOT, read

RESULTS = "bench/results/two_cores.json"


def test_the_page_has_what_the_command_shows(capsys):
    assert main(["--show", str(ROOT / RESULTS)]) == 0
    shown = capsys.readouterr().out.strip()
    on_page = read("docs/benchmarks.md").partition(BEGIN)[2].partition(END)[0].strip()
    assert on_page == shown, f"python -m bench --show {RESULTS} --page docs/benchmarks.md"


def test_a_page_is_filled_between_its_marks_alone(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old{END}\nafter\n")
    assert main(["--show", str(ROOT / RESULTS), "--page", str(page)]) == 0
    assert page.read_text() == f"before\n{BEGIN}\n\n{capsys.readouterr().out}\n{END}\nafter\n"

    page.write_text(f"{BEGIN} alone")
    assert main(["--show", str(ROOT / RESULTS), "--page", str(page)]) == 2
    assert page.read_text() == f"{BEGIN} alone"


SETTING = {"date": "2026-11-30", "machine": "any"}
RATIO = {"median": 1.0, "lowest": 1.0, "highest": 1, "low": 1.0, "high": 1.0, "num_pairs": 11}
SPEED = {"name": "ours", "peer": "", "layout": "NCHW", "ours_ms": 1.0, "other_ms": 1, "ratio": RATIO}


def write(file, setting=SETTING, speeds=(SPEED,)):
    content = {"setting": setting, "speeds": speeds, "quantities": [], "failures": [], "left_out": []}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"setting": {}, "speeds": [{"name": "x"}]}'])
def test_another_file_is_refused(tmp_path, text):
    file = Path(tmp_path, "other.json")
    file.write_text(text)
    with pytest.raises(BNextError, match="other.json"):
        read_record(file)


@pytest.mark.parametrize(
    "content",
    [
        {"setting": {}},
        {"setting": ["date", "machine"]},
        {"setting": {**SETTING, "threads": 2}},
        {"speeds": "many"},
        {"speeds": ["one"]},
        {"speeds": [{**SPEED, "ours_ms": None}]},
        {"speeds": [{**SPEED, "layout": "NHWC"}]},
        {"speeds": [{**SPEED, "ratio": {**RATIO, "median": None}}]},
        {"speeds": [{**SPEED, "ratio": [1.0]}]},
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, capsys, content):
    file = tmp_path / "broken.json"
    write(file)
    assert main(["--show", str(file)]) == 0
    capsys.readouterr()

    write(file, **content)
    assert main(["--show", str(file)]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert "broken.json" in said.err


def test_what_is_shown_is_not_measured(tmp_path, capsys):
    file = str(ROOT / RESULTS)
    for options in (["--json", "x"], ["--only", "ghost"], ["--pairs", "2"], ["--all"], ["--device", "cpu"]):
        assert main(["--show", file, *options]) == 2
        assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot", "--page"])
def test_files_are_tried_before_anything_is_measured(tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr("bench.__main__.measure", pytest.fail)
    assert main([option, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err

"""The page of benchmarks shows the committed results."""

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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"setting": {}, "speeds": [{"name": "x"}]}'])
def test_another_file_is_refused(tmp_path, text):
    file = Path(tmp_path, "other.json")
    file.write_text(text)
    with pytest.raises(BNextError, match="other.json"):
        read_record(file)

"""The bench of whole runs: growth is an exponent, sets are such as the checks take, and the table is printed."""

import json

import pytest

from bench.whole_runs import MEASURES, main, summarize, write_pictures, write_set
from bnext.data.check_coco import check_datasets
from bnext.data.listed_sets import ListedSet, register_sets


def test_growth_is_the_exponent_of_the_size():
    small = summarize("doctor", 10, [{"findings": 3.0}, {"findings": 1.0}, {"findings": 2.0}], [])
    (large,) = summarize("doctor", 100, [{"findings": 200.0}], small)

    assert (small[0].median, small[0].lowest, small[0].highest, small[0].growth) == (2, 1, 3, None)
    assert large.growth == pytest.approx(2)


def test_a_set_passes_the_checks(tmp_path):
    write_pictures(tmp_path, 20)
    write_set(tmp_path / "20.json", 20)
    register_sets([ListedSet("coco_shaped", str(tmp_path / "20.json"), str(tmp_path / "pictures"))])
    try:
        check_datasets(["coco_shaped"])
    finally:
        register_sets([])


def test_the_table_and_the_file(tmp_path, capsys):
    assert main(["--only", "collectives", "--json", str(tmp_path / "runs.json")]) == 0

    figures = json.loads((tmp_path / "runs.json").read_text())["figures"]
    last = {figure["stage"]: figure["median"] for figure in figures if figure["size"] == 64}
    assert last["gathered by all, KB"] / last["by owners, KB"] == pytest.approx(32)
    assert "| collectives | by owners, KB" in capsys.readouterr().out
    assert MEASURES["doctor"][1](10, tmp_path).keys() == {"findings", "text"}

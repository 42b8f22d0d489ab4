"""The figures of the studies: what their cards and the page of evidence show is what the committed results say."""

import re

import pytest
from evidence import EXHIBITS, ROOT, show_exhibit

from tests.docs.pages import read
from tests.markdown import read_tables


@pytest.mark.parametrize("name", EXHIBITS)
def test_the_card_has_the_tables_of_the_results(name):
    tables = read_tables(EXHIBITS[name].card.read_text())
    shown = read_tables(show_exhibit(name))
    assert shown
    for table in shown:
        assert table in tables, f"python projects/evidence.py {name}"


def test_every_exhibit_is_on_the_page_and_every_file_of_results_is_an_exhibit():
    on_page = re.findall(r"made at build: evidence (\w+)", read("docs/evidence.md"))
    assert sorted(on_page) == sorted(EXHIBITS)
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("*/results/*.json")}
    assert files == {f"{exhibit.study}/results/{exhibit.results}" for exhibit in EXHIBITS.values()}

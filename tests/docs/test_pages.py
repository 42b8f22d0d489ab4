"""What the pages show runs: Python blocks are executed, YAML blocks are configs, commands are parsed, names exist."""

import re

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.config import load_config
from bnext.diagnostics.registry import find_checks
from tests.docs.pages import DOCS, PAGES, ROOT, find_blocks, has_key, read
from tests.faults.__main__ import KINDS

SYMPTOMS = [page for page in PAGES if "/symptoms/" in page and not page.endswith("index.md")]
HEADINGS = ["How to tell", "Why", "What to do", "What it costs"]


@pytest.fixture
def catalogs():
    """What a page registers is gone afterwards."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "python")])
def test_python_blocks_run_one_after_another(page, monkeypatch, catalogs, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "a_page"}
    for number, block in enumerate(find_blocks(page, "python")):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if find_blocks(page, "yaml")])
def test_yaml_blocks_are_configs(page, tmp_path):
    for number, block in enumerate(find_blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"VERSION": 2, **yaml.safe_load(block)}))
        load_config(str(path))


def test_lazy_configs_are_read(tmp_path):
    files = [block for page in PAGES for block in find_blocks(page, "python") if block.startswith("# my_config.py")]
    assert files
    for number, text in enumerate(files):
        path = tmp_path / f"config_{number}.py"
        path.write_text(text)
        assert load_config(str(path)).MODEL.WEIGHTS


@pytest.mark.parametrize("page", SYMPTOMS)
def test_a_symptom_has_its_four_parts_and_its_row(page):
    assert re.findall(r"^## (.*)$", read(page), flags=re.MULTILINE) == HEADINGS
    assert f"]({page.rpartition('/')[2]}) |" in read("docs/symptoms/index.md")


def test_keys_that_are_named_exist():
    unknown = []
    for page in PAGES:
        keys = re.findall(r"\b(?:MODEL|SOLVER|TEST|DATASETS|INPUT)(?:\.[A-Z0-9_]+)+", read(page))
        unknown += [f"{page}: {key}" for key in keys if not has_key(key.replace(".PLACE.", ".FPN."))]
    assert not unknown


def test_files_that_are_named_exist():
    missing = []
    for page in PAGES:
        named = re.findall(r"(?<![\w/.])(?:configs|projects|tools|datasets|tests)/[\w/-]+\.(?:py|yaml|md)", read(page))
        missing += [f"{page}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing


def test_nothing_is_left_to_fill_in():
    assert not [page for page in PAGES if re.findall(r"@[A-Z]+@", read(page))]


def test_every_page_is_of_the_folder_that_the_site_is_built_from():
    assert (DOCS / "conf.py").is_file()
    assert len(SYMPTOMS) >= 20


def test_the_damage_that_is_told_of_is_what_is_tried():
    """A fault that is added to a table is measured anew."""
    attempts = re.findall(r"^\| [^|]+ \| ([\d,]+) \|", read("docs/robustness.md"), flags=re.MULTILINE)
    counts = [count for count, _ in KINDS.values()]
    assert [int(number.replace(",", "")) for number in attempts] == counts


def test_codes_that_are_named_exist():
    unknown = []
    for page in [*PAGES, "README.md"]:
        unknown += [f"{page}: {code}" for code in re.findall(r"\bBN\d{3}\b", read(page)) if code not in find_checks()]
    assert not unknown

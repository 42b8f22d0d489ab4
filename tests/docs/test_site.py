"""The site is built without a warning, and its pages open from the file system without network."""

import re
import shutil
import subprocess
import sys

import pytest

from bnext.cli.main import COMMANDS
from bnext.config.keys import KEYS, PLACE_KEYS
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_json import read_schema
from tests.docs.pages import DOCS, PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "cache")]
    done = subprocess.run([*command, str(DOCS), str(folder / "html")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


def test_every_page_is_in_the_site(site):
    for page in PAGES:
        assert (site / page.removeprefix("docs/")).with_suffix(".html").is_file()


def test_nothing_is_loaded_from_the_network(site):
    """What a browser loads by itself; links that a reader follows are others."""
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\bhref=\"(?:https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    assert not [page.name for page in pages if loaded.search(page.read_text())]
    assert not [
        sheet.name
        for sheet in site.rglob("*.css")
        if re.search(r"(?:url\(|@import\s)[\"']?(?:https?:)?//", sheet.read_text())
    ]


def test_the_search_works_from_a_file(site):
    """Its index is a script that the page loads, as a page from a file may not fetch one."""
    assert 'src="searchindex.js"' in (site / "search.html").read_text()
    assert "xylophone" not in (site / "searchindex.js").read_text()
    assert "shuffl" in (site / "searchindex.js").read_text()


def test_every_key_and_every_command_has_its_entry(site):
    keys, commands = (site / "keys.html").read_text(), (site / "commands.html").read_text()
    of_places = {key.name for keys in PLACE_KEYS.values() for key in keys}
    names = [f"MODEL.BNEXT.PLACE.{name.split('.')[-1]}" if name in of_places else name for name in KEYS]
    assert not [name for name in names if f'id="confval-{name}"' not in keys]
    assert not [name for name in COMMANDS if f">bnext {name}<" not in commands]


def test_every_check_has_its_section_and_its_symptoms(site):
    page = (site / "doctor-codes.html").read_text()
    for check in find_checks().values():
        assert f'id="{check.page.rpartition("#")[2]}"' in page
    assert 'href="symptoms/half-ap.html"' in page
    assert 'href="../doctor-codes.html#bn001"' in (site / "symptoms/half-ap.html").read_text()


def test_every_name_of_the_json_report_is_told(site):
    page = (site / "doctor.html").read_text()
    schema = read_schema()
    names = [*schema["properties"], *schema["$defs"]["finding"]["properties"], *schema["$defs"]["group"]["properties"]]
    assert not [name for name in names if f">{name}<" not in page]


def test_keys_in_the_text_are_links(site):
    page = (site / "symptoms/batch-of-2.html").read_text()
    assert 'href="../keys.html#confval-SOLVER.BNEXT.FREEZE.ITER"' in page


def test_the_notebook_runs_in_a_fresh_process_and_is_kept_with_its_output(tmp_path, site):
    notebook = shutil.copy(DOCS / "notebook.ipynb", tmp_path)
    command = [sys.executable, "-W", "error", str(DOCS / "notebook_cells.py"), "--check", str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "data:image/png;base64," in (site / "notebook.html").read_text()

"""What the documents show runs: Python blocks are executed, YAML blocks are configs, files exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from bnext.cli.main import main
from bnext.config import load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "configs/README.md",
    "projects/PopulationStatistics/README.md",
    "projects/RethinkingBatchNorm/README.md",
    "datasets/README.md",
    "CONTRIBUTING.md",
]


def find_blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("document", "number"),
    [(document, number) for document in DOCUMENTS for number in range(len(find_blocks(document, "python")))],
)
def test_python_block_runs(document, number, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(find_blocks(document, "python")[number], f"{document}, block {number}", "exec"), {})


def test_yaml_blocks_are_configs(tmp_path):
    blocks = find_blocks("README.md", "yaml")
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"VERSION": 2, **yaml.safe_load(block)}))
        load_config(str(path))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_left_to_fill_in(document):
    assert re.findall(r"@[A-Z]+@", (ROOT / document).read_text()) == []


def test_the_method_card_has_the_configs_numbers():
    card = (ROOT / "projects/RethinkingBatchNorm/README.md").read_text()
    for name in ("digits", "coco"):
        cfg = load_config(str(ROOT / f"projects/RethinkingBatchNorm/configs/{name}/table5_row3.yaml"))
        iterations, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
        assert f"{iterations:,} iterations of {batch} images" in card
        assert f"{cfg.TEST.PRECISE_BN.NUM_ITER * batch:,} training images" in card


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?<![\w/.])(?:configs|projects|tools|datasets)/[\w/.-]+\.(?:py|yaml|md)", text))
    missing = [
        name for name in named if not (ROOT / name).exists() and not (ROOT / document).parent.joinpath(name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / document).read_text())
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]


def test_the_doctor_says_what_the_readme_shows(capsys):
    (block,) = [block for block in find_blocks("README.md", "text") if block.startswith("$ bnext doctor ")]
    command, *shown = block.splitlines()

    assert main(shlex.split(command.removeprefix("$ bnext "))) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line not in said] == []


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_nobody_is_sent_to_the_package_index_for_bnext():
    """It is not there: an extra is named by its packages, or installed from the checkout."""
    files = [*ROOT.glob("bnext/**/*.py"), *ROOT.glob("docs/**/*.md"), *(ROOT / name for name in DOCUMENTS)]
    assert not [str(file) for file in files if re.search(r"bnext\[|pip install bnext", file.read_text())]

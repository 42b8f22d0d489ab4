"""The command `bnext`: its table, its help, what it says without detectron2, and configs by their names."""

from __future__ import annotations

import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

from bnext.cli.main import COMMANDS, build_parser, main
from bnext.config import load_config
from bnext.config.files import find_config_file, get_config_file, name_config_file
from bnext.errors import ConfigError
from bnext.packages import explain_missing
from tests import tiny

NAME = "Digits-Detection/retinanet_R_18_FPN.yaml"
WITH_PARSER = [name for name in COMMANDS if name != "install-detectron2"]
WITHOUT_DETECTRON2 = """
import sys
sys.modules["detectron2"] = None
from bnext.cli.main import COMMANDS, main
for name in COMMANDS:
    if name not in ("check-gpu", "install-detectron2"):
        assert main([name, "--help"]) == 2, name
assert "torch" not in sys.modules
for name in ("install-detectron2", "check-gpu"):
    try:
        main([name, "--help"])
    except SystemExit as error:
        assert error.code == 0
"""


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("name", WITH_PARSER)
def test_help_begins_with_an_example_and_explains_every_option(name):
    parser = build_parser(name, f"bnext {name}")
    assert f"\n    bnext {name}" in parser.description
    for action in parser._actions:
        assert action.help, action.option_strings


def test_training_has_the_options_of_detectron2s_and_two_of_its_own():
    assert options_of(build_parser("train")) == options_of(default_argument_parser()) | {"--import", "--verbose"}


def test_pairs_may_follow_an_option_of_several_words(capsys):
    words = ["--kinds", "precise", "SEED", "1", "--output", "nowhere"]
    assert main(["compare", "--config-file", str(tiny.CONFIG), *words, "MODEL.WEIGHTS", "nowhere.pth"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--kinds" not in error


def test_the_help_lists_every_command(capsys):
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert [name for name in COMMANDS if f"\n  {name} " not in printed] == []


@pytest.mark.parametrize(("word", "said"), [("trian", "Did you mean train?"), ("x", "See bnext --help.")])
def test_an_unknown_command_is_a_line(word, said, capsys):
    assert main([word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "words", [["train", "my.yaml"], ["train", "my.py", "train.max_iter=3"], ["compare", "my.yaml"]]
)
def test_a_config_without_its_option_is_a_line(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--config-file {words[1]}" in line


def test_without_detectron2_each_command_says_how_to_get_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_DETECTRON2], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WITH_PARSER) - 1  # check-gpu needs none
    assert all("`bnext install-detectron2`" in line and "conda-forge" in line for line in lines)
    assert "--no-deps" in done.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("no", name="sklearn.datasets"), "pip install scikit-learn"),
        (ModuleNotFoundError("no", name="cv2"), "pip install opencv-python-headless"),
        (ImportError("libGL.so.1: cannot open shared object file"), "pip install opencv-python-headless"),
        (ModuleNotFoundError("no", name="detectron2.modeling"), "bnext install-detectron2"),
    ],
)
def test_a_package_that_is_missing_is_a_line_with_its_command(error, words):
    assert words in str(explain_missing(error))


@pytest.mark.parametrize("error", [ModuleNotFoundError("no", name="my_module"), ImportError("no"), ValueError("no")])
def test_other_errors_are_no_missing_package(error):
    assert explain_missing(error) is None


def test_a_config_of_the_package_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config_file(NAME) == get_config_file(NAME)
    assert load_config(NAME).MODEL.META_ARCHITECTURE == load_config(get_config_file(NAME)).MODEL.META_ARCHITECTURE
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {NAME}\nSOLVER: {{MAX_ITER: 7}}\n")
    assert load_config("mine.yaml").SOLVER.MAX_ITER == 7

    assert name_config_file(get_config_file(NAME)) == NAME
    assert name_config_file("mine.yaml") == "mine.yaml"
    (tmp_path / "Digits-Detection").mkdir()
    (tmp_path / NAME).write_text("SOLVER: {MAX_ITER: 8}\n")
    assert find_config_file(NAME) == NAME, "a file of the user comes first"
    assert name_config_file(get_config_file(NAME)) == get_config_file(NAME)
    assert load_config(NAME).SOLVER.MAX_ITER == 8


@pytest.mark.parametrize("name", ["", "no.yaml", "Digits-Detection", "a\0b", "x" * 5000, "https://host/a.yaml"])
def test_other_names_are_left_as_they_are(name):
    assert find_config_file(name) == name


def test_a_misspelt_name_of_a_config():
    with pytest.raises(ConfigError, match="Did you mean Digits-Detection/retinanet_R_18_FPN.yaml"):
        get_config_file("Digits-Detection/retinanet_R18_FPN.yaml")

"""`bnext check-data`: all faults at once, and what is in a set without one."""

import json
import sys

import pytest
from PIL import Image

from bnext import user_modules
from bnext.cli.main import main
from bnext.data.listed_sets import register_sets
from tests import tiny
from tests.evaluation.own_sets import SIDE, make_set


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a whole set: own.json and its pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(user_modules, "_imported", {})
    content = make_set()
    (tmp_path / "own.json").write_text(json.dumps(content))
    (tmp_path / "pictures").mkdir()
    for image in content["images"]:
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "pictures" / image["file_name"])
    yield tmp_path
    register_sets([])


def check(*words):
    return main(["check-data", *map(str, words)])


def test_a_file_without_a_config(folder, capsys):
    assert check("--json", "own.json", "--folder", "pictures") == 0
    text = capsys.readouterr().out
    assert "own: no fault" in text
    assert "4 images" in text
    assert "12 objects" in text
    assert all(name in text for name in ("cat", "dog", "owl"))


def test_all_faults_are_named_and_asked_for_again(folder, capsys):
    content = make_set()
    content["annotations"][0]["iscrowd"] = "0"
    content["annotations"][1]["bbox"][2] = -5
    (folder / "own.json").write_text(json.dumps(content))
    (folder / "pictures/2.png").unlink()

    for _ in range(2):
        assert check("--json", "own.json", "--folder", "pictures") == 2
        text = capsys.readouterr()
        lines = text.err.strip().splitlines()
        assert all(line.startswith("error: ") for line in lines)
        assert [word for word in ("iscrowd", "-5", "2.png") if word not in text.err] == []
        assert "own: " in text.out
        assert "no fault" not in text.out


def test_the_sets_of_a_config_fit_its_model(digits, folder, capsys):
    config = ("--config-file", tiny.CONFIG, "OUTPUT_DIR", folder)
    assert check(*config) == 0
    assert "digits_val: no fault" in capsys.readouterr().out
    assert check(*config, "MODEL.RETINANET.NUM_CLASSES", 9) == 2
    assert "MODEL.*.NUM_CLASSES" in capsys.readouterr().err
    assert check(*config, "MODEL.RETINANET.NUM_CLASSES", 11) == 2
    assert "Write MODEL.RETINANET.NUM_CLASSES: 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [((), "--dataset"), (("--json", "own.json"), "--folder"), (("--dataset", "nobody_has_it"), "'nobody_has_it'")],
)
def test_a_request_without_a_set_is_refused(folder, capsys, words, named):
    assert check(*words) == 2
    assert named in capsys.readouterr().err


def test_a_set_that_is_registered_in_main_is_refused_with_its_module(folder, capsys):
    lines = ["from detectron2.data.datasets import register_coco_instances", "def main():"]
    lines.append("    register_coco_instances('in_main', {}, 'own.json', 'pictures')")
    lines.append("if __name__ == '__main__':\n    main()")
    (folder / "registers_late.py").write_text("\n".join(lines))
    assert check("--import", "registers_late", "--dataset", "in_main") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert "registers_late" in text

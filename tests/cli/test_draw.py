"""`bnext draw` on a tiny training: columns of checkpoints and kinds, and what is refused before anything is drawn."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnext.cli.main import main
from tests import tiny


def read_pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def draw(finished):
    """Runs the command on the tiny training: the exit status."""
    cfg = finished[0]
    pairs = ["MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    pairs += ["TEST.PRECISE_BN.NUM_ITER", "2"]

    def run(*words):
        return main(["draw", "--config-file", str(tiny.CONFIG), *map(str, words), *pairs])

    return run


def test_checkpoints_and_kinds_are_drawn_side_by_side(draw, finished, tmp_path, capsys):
    first, last = (Path(finished[0].OUTPUT_DIR, name) for name in ("model_0000002.pth", "model_final.pth"))
    before = last.read_bytes()
    pictures = tmp_path / "boxes.png", tmp_path / "bars.png"
    arguments = ["--output", pictures[0], "--bars", pictures[1], "--score", "0.02", "--num-images", "2", "--worst"]
    assert draw(*arguments, "--kinds", "moving_average", "precise", "--weights", first, last) == 0

    printed = capsys.readouterr().out
    assert "boxes in 4 images" in printed
    assert "missed object" in printed
    assert printed.count("model_final, precise, pooled") == 1
    for picture in pictures:
        assert min(read_pixels(picture).shape[:2]) > 400
    assert last.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "boxes.png"]


def test_a_set_without_annotations_is_drawn_and_it_is_said(draw, unlabelled, tmp_path, capsys):
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get(unlabelled).evaluator_type = "coco"
    assert draw("--output", tmp_path / "a.png", "--dataset", unlabelled, "--images", "000001.png") == 0
    assert "has no annotations" in capsys.readouterr().out
    assert draw("--output", tmp_path / "b.png", "--dataset", unlabelled, "--worst") == 2
    assert "--worst" in capsys.readouterr().err


@pytest.mark.slow
def test_each_domain_has_a_row_of_its_images(draw, digits, tmp_path, capsys):
    sets = ["DATASETS.TEST", "('digits_val', 'digits_train')", "DATASETS.DOMAINS.TEST", "('day', 'night')"]
    words = ["--per-domain", "--score", "0.02", "--num-images", "2", "--output"]
    assert draw(*words, tmp_path / "both.png", *sets) == 0
    printed = capsys.readouterr().out
    assert printed.index("day") < printed.index("night")
    assert draw(*words, tmp_path / "one.png", "DATASETS.DOMAINS.TEST", "('day',)") == 0
    both, one = (read_pixels(tmp_path / f"{name}.png").shape[0] for name in ("both", "one"))
    assert both > one + 200


def test_kinds_are_those_of_the_comparison(draw, tmp_path):
    """Statistics of the file, and of each image: other boxes."""
    for name, kind in (("a", "moving_average"), ("b", "mini_batch")):
        assert draw("--output", tmp_path / f"{name}.png", "--score", "0", "--num-images", "1", "--kinds", kind) == 0
    one, other = (read_pixels(tmp_path / f"{name}.png")[60:400, :400] for name in "ab")
    assert (one != other).any()


REFUSED = {
    "an unknown kind": (["--kinds", "exact"], "--kinds"),
    "no images": (["--num-images", "0"], "--num-images"),
    "an unknown image": (["--images", "nowhere.png"], "nowhere.png"),
    "an unknown set": (["--dataset", "nowhere"], "nowhere"),
    "no PNG": (["--output", "boxes.jpg"], ".png"),
    "a folder that is missing": (["--output", "nowhere/boxes.png"], "nowhere"),
    "bars in the same file": (["--bars", "./boxes.png"], "--bars"),
    "bars that exist": (["--bars", "there.png"], "--bars"),
    "weights that are missing": (["--weights", "nowhere.pth"], "nowhere.pth"),
    "two choices": (["--worst", "--seed", "1"], "choice of images"),
    "too few names": (["--weights", "a.pth", "b.pth", "--names", "a"], "--names"),
    "an IoU of none": (["--iou", "0"], "--iou"),
    "a score that is none": (["--score", "2"], "--score"),
    "too many columns": (["--weights", *(f"{name}.pth" for name in "abcdefg")], "6 columns"),
    "a domain's images that are not named": (["--kinds", "per_domain"], "--domain-dataset"),
    "a domain that there is not": (["--domain", "night"], "--domain"),
    "sets without domains": (["--per-domain"], "--per-domain"),
    "one set and all domains": (["--per-domain", "--dataset", "digits_val"], "--per-domain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_line_and_nothing_is_drawn(draw, digits, tmp_path, monkeypatch, capsys, name):
    words, thing = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_bytes(b"mine")
    assert draw("--output", "boxes.png", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert thing in line
    assert os.listdir() == ["there.png"]
    assert Path("there.png").read_bytes() == b"mine"


def test_pictures_that_exist_stay_unless_they_are_to_be_replaced(draw, digits, tmp_path, capsys):
    path = tmp_path / "boxes.png"
    path.write_bytes(b"mine")
    assert draw("--output", path) == 2
    assert path.read_bytes() == b"mine"

    image = digits / "digits/val/000001.png"
    before = image.read_bytes()
    assert draw("--output", image, "--overwrite") == 2, "an image of the set"
    assert image.read_bytes() == before
    assert "what is read" in capsys.readouterr().err

    assert draw("--output", path, "--overwrite", "--num-images", "1") == 0
    assert path.read_bytes().startswith(b"\x89PNG")

"""The digits set: its bytes, its annotations, and what is left of an interrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_sample_images

from bnext.data.digits import CLASSES, VERSION, has_digits, prepare_digits, read_recipe
from bnext.data.digits_images import DigitsRecipe, draw_picture, load_sources
from bnext.errors import DatasetError

SMALL = DigitsRecipe(num_train=24, num_val=12)
SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_digits.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
COMMAND = [sys.executable, "-W", "ignore", str(SCRIPT)]  # libraries that are imported on the way may warn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("datasets"))


def prepare(root: Path, recipe: DigitsRecipe = SMALL, **options: bool) -> Path:
    return prepare_digits(root, recipe, progress=False, **options)


def load(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_coco(folder: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "annotations" / f"instances_{split}.json"))


def test_two_runs_are_byte_identical(folder: Path, tmp_path: Path) -> None:
    again = checksums(prepare(tmp_path))
    assert again == checksums(folder)
    assert len(again) == 24 + 12 + 3


def test_another_seed_gives_other_pictures(folder: Path, tmp_path: Path) -> None:
    other, first = checksums(prepare(tmp_path, replace(SMALL, seed=1))), checksums(folder)
    pictures = [name for name in first if name.endswith(".png")]
    assert not [name for name in pictures if other[name] == first[name]]


def test_first_pictures_do_not_depend_on_their_number(folder: Path, tmp_path: Path) -> None:
    larger = prepare(tmp_path, DigitsRecipe(num_train=30, num_val=13))
    first, second = checksums(folder), checksums(larger)
    for split, number in (("train", 24), ("val", 12)):
        few, many = load(folder, split), load(larger, split)
        assert many["images"][:number] == few["images"]
        assert many["annotations"][: len(few["annotations"])] == few["annotations"]
    pictures = [name for name in first if name.endswith(".png")]
    assert [first[name] for name in pictures] == [second[name] for name in pictures]


def test_a_style_leaves_the_digits_and_their_places_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Pictures differ from one another in contrast, the more the higher it is; without it nothing is written of it."""
    spreads = []
    for style in (0.0, 0.5, 1.0):
        styled = prepare(tmp_path / str(style), replace(SMALL, num_val=1, image_style=style))
        assert load(styled, "train") == load(folder, "train")
        pictures = [np.asarray(Image.open(path)).astype(float) for path in sorted((styled / "train").iterdir())]
        spreads.append(np.std([np.log(picture.std()) for picture in pictures]))

    assert spreads[0] < spreads[1] < spreads[2]
    assert checksums(tmp_path / "0.0/digits/train") == checksums(folder / "train")
    assert "image_style" not in (folder / "digits.json").read_text()
    assert read_recipe(styled).image_style == 1


def test_a_picture_has_no_more_classes_than_it_may(tmp_path: Path) -> None:
    one = prepare(tmp_path, replace(SMALL, num_val=1, image_classes=1))
    classes: dict[int, set[int]] = {}
    for annotation in load(one, "train")["annotations"]:
        classes.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
    assert {len(each) for each in classes.values()} == {1}
    assert len(set.union(*classes.values())) > 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_agree_with_their_masks(folder: Path, split: str) -> None:
    content = load(folder, split)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for image in content["images"]:
        with Image.open(folder / split / image["file_name"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (image["width"], image["height"]))
    assert [category["name"] for category in content["categories"]] == list(CLASSES)
    assert [category["id"] for category in content["categories"]] == list(range(1, 11))
    assert {a["image_id"] for a in content["annotations"]} == set(sizes)  # no picture without a digit

    for annotation in content["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"])
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert mask.shape == sizes[annotation["image_id"]]
        assert annotation["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        assert annotation["area"] == mask.sum() > 0
        assert annotation["iscrowd"] == 0


def test_boxes_of_a_picture_do_not_overlap(folder: Path) -> None:
    coco = read_coco(folder, "train")
    for image_id in coco.getImgIds():
        boxes = np.array([a["bbox"] for a in coco.imgToAnns[image_id]])
        overlap = coco_mask.iou(boxes, boxes, [0] * len(boxes)) - np.eye(len(boxes))
        assert np.abs(overlap).max() < 1e-9


def test_a_digit_stands_out_from_its_background(folder: Path) -> None:
    """The mask covers the ink alone (one colour but for its soft edge), far from what surrounds it in its window."""
    coco = read_coco(folder, "train")
    for annotation in coco.anns.values():
        with Image.open(folder / "train" / coco.imgs[annotation["image_id"]]["file_name"]) as picture:
            light = np.asarray(picture.convert("L"), dtype=float)
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)

        x, y, width, height = map(int, annotation["bbox"])
        window = np.zeros_like(mask)
        window[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + width + 2] = True
        assert abs(light[mask].mean() - light[window & ~mask].mean()) > 40
        assert light[mask].std() < 42


def test_splits_share_no_digit_and_no_background() -> None:
    train, val = load_sources("train"), load_sources("val")
    scans = [{digit.tobytes() for digit in sources.digits} for sources in (train, val)]
    assert not scans[0] & scans[1]
    assert len(train.labels) + len(val.labels) == 1797
    assert set(train.labels) == set(val.labels) == set(range(10))

    assert len(train.backgrounds) == 3 * len(val.backgrounds) == 12
    blocks = [*train.backgrounds, *val.backgrounds]
    assert len({block.tobytes() for block in blocks}) == 16
    whole = sum(int(photograph[:426].astype(int).sum()) for photograph in load_sample_images().images)
    assert sum(int(block.astype(int).sum()) for block in blocks) == whole  # each pixel once: no block overlaps another


def test_objects_fall_on_every_level() -> None:
    """Each of RetinaNet's levels, its anchors scaled to 128 pixels, holds the best anchor of some digits."""
    import torch
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.structures import Boxes, pairwise_iou

    recipe, sources = DigitsRecipe(), load_sources("train")
    boxes = []
    for index in range(150):
        for digit in draw_picture(recipe, sources, np.random.default_rng(index))[1]:
            rows, columns = np.nonzero(digit.mask)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    sizes = [[size * 2 ** (octave / 3) for octave in range(3)] for size in (6, 12, 24, 48, 96)]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8, 16, 32, 64, 128], offset=0.5
    )
    levels = generator([torch.zeros(1, 1, side, side) for side in (16, 8, 4, 2, 1)])
    truth = Boxes(torch.tensor(boxes))
    best = torch.stack([pairwise_iou(truth, anchors).max(1).values for anchors in levels], 1)
    share = torch.bincount(best.argmax(1), minlength=5) / len(boxes)
    assert share.min() > 0.02, share


def test_a_set_that_is_there_is_left_untouched(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(folder.parent) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert os.listdir(folder.parent) == ["digits"]


def test_other_arguments_need_overwrite(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "digits")
    with pytest.raises(DatasetError, match=r"num_train=24 instead of 2.*--overwrite"):
        prepare(tmp_path, replace(SMALL, num_train=2))
    assert checksums(tmp_path / "digits") == checksums(folder)
    prepare(tmp_path, replace(SMALL, num_train=2), overwrite=True)
    assert read_recipe(tmp_path / "digits").num_train == 2
    assert len(os.listdir(tmp_path / "digits" / "train")) == 2
    assert os.listdir(tmp_path) == ["digits"]


def test_a_strange_folder_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("precious")
    with pytest.raises(DatasetError, match="move it away by hand"):
        prepare(tmp_path, overwrite=True)
    assert (tmp_path / "digits" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("victim", ["train/000003.png", "annotations/instances_val.json", "val"])
def test_a_set_that_lost_something_is_not_whole(folder: Path, tmp_path: Path, victim: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "digits"))
    assert has_digits(tmp_path)
    if victim == "val":
        shutil.rmtree(copy / victim)
    else:
        (copy / victim).unlink()

    assert not has_digits(tmp_path)
    with pytest.raises(DatasetError, match="--overwrite"):
        prepare(tmp_path)
    prepare(tmp_path, overwrite=True)
    assert checksums(copy) == checksums(folder)


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", '{"version": 0, "recipe": {"scale_range": [0.1, 0.9]}}', '{"recipe": 3}']
)
def test_a_broken_manifest_is_named(folder: Path, tmp_path: Path, manifest: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "digits"))
    (copy / "digits.json").write_text(manifest)
    assert not has_digits(tmp_path)
    with pytest.raises(DatasetError, match=rf"digits\.json of version {VERSION}"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"num_train": 0}, "num_train"),
        ({"image_side": 16}, "image_side"),
        ({"scale_range": (0.5, 0.2)}, "scale_range must hold"),
        ({"scale_range": (0.02, 0.9)}, "8 pixels or more"),
        ({"max_objects": 5, "scale_range": (0.8, 0.9)}, "max_objects"),
    ],
)
def test_arguments_outside_their_range(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, DigitsRecipe(**arguments))
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="writable.*file/digits"):
        prepare(tmp_path / "file")


def wait_for_pictures(process: subprocess.Popen, root: Path) -> None:
    deadline = time.monotonic() + 90
    while len(list(root.glob("*/train/*.png"))) < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_that_passes_as_whole(folder: Path, tmp_path: Path) -> None:
    """kill -9 leaves rubbish that the next run removes; Ctrl-C leaves nothing."""
    roots = [tmp_path / "killed", tmp_path / "interrupted"]
    processes = [
        subprocess.Popen(
            [*COMMAND, str(root), "--num-train", "100000"],
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            preexec_fn=heed_interrupts,
        )
        for root in roots
    ]

    try:
        for process, root, how in zip(processes, roots, (signal.SIGKILL, signal.SIGINT), strict=True):
            wait_for_pictures(process, root)
            process.send_signal(how)
            assert process.wait(timeout=30) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=30)

    killed, interrupted = roots
    assert os.listdir(interrupted) == []
    assert len(list(killed.glob("*/train/*.png"))) >= 20
    assert not (killed / "digits").exists()
    assert not has_digits(killed)
    prepare(killed)
    assert checksums(killed / "digits") == checksums(folder)
    assert os.listdir(killed) == ["digits"]


@pytest.mark.slow
def test_processes_that_start_together_make_one_set(folder: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path), "--num-train", "24", "--num-val", "12"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert checksums(tmp_path / "digits") == checksums(folder)
    assert os.listdir(tmp_path) == ["digits"]


def test_command_line_reports_a_mistake_in_one_line(folder: Path) -> None:
    command = [*COMMAND, str(folder.parent), "--seed", "5"]
    result = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: The digits set")
    assert result.stderr.count("\n") == 1


def test_without_scikit_learn_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError, match="pip install scikit-learn"):
        load_sources("train")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_as_prediction_has_full_ap(folder: Path, kind: str) -> None:
    truth = read_coco(folder, "val")
    results = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox", "segmentation")}, "score": 1.0}
        for a in truth.anns.values()
    ]

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)

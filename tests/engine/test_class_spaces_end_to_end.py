"""Two sets, each with half of the digits annotated, train one model of ten classes."""

import json
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from bnext.cli.train import check_run
from bnext.data.batches import build_validation_batches
from bnext.data.loader import build_train_loader
from bnext.engine import Trainer
from bnext.engine.trainer import train
from bnext.errors import ConfigError
from tests import tiny
from tests.heads.detectors import run_step

LOW, HIGH = "01234", "56789"
DIGITS = ("DATASETS.BNEXT.CLASSES", repr(tuple(LOW + HIGH)))
SETS = ("DATASETS.TRAIN", "('low_train', 'high_train')", "DATASETS.TEST", "('low_val', 'high_val', 'digits_val')")
NO_MAP = ("DATASETS.BNEXT.CLASS_MAP", "[]")


def write_half(source, target, digits, prefix):
    """An annotation file of the same pictures with some of the digits alone, by other names."""
    content = json.loads(source.read_text())
    kept = [each for each in content["categories"] if each["name"] in digits]
    numbers = {each["id"] for each in kept}
    content["categories"] = [{**each, "name": prefix + each["name"]} for each in kept]
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] in numbers]
    target.write_text(json.dumps(content))


@pytest.fixture
def load(digits, tmp_path):
    """A config of two halves of the digits; one calls them by other names, which the config maps."""
    sets = []
    for part in ("train", "val"):
        metadata = MetadataCatalog.get(f"digits_{part}")
        for half, kept, prefix in (("low", LOW, ""), ("high", HIGH, "digit ")):
            file = tmp_path / f"{half}_{part}.json"
            write_half(Path(metadata.json_file), file, kept, prefix)
            sets.append({"name": f"{half}_{part}", "json": str(file), "folder": metadata.image_root})

    mapped = [{f"high_{part}": {f"digit {each}": each for each in HIGH}} for part in ("train", "val")]
    node = ("DATASETS.BNEXT.COCO", sets, "DATASETS.BNEXT.CLASS_MAP", mapped)

    def load(*opts, config=tiny.CONFIG):
        return tiny.load(tmp_path / "out", *node, *SETS, *opts, config=config)

    return load


@pytest.mark.slow
def test_two_halves_of_the_digits_train_one_model(load):
    pairs = ("SOLVER.MAX_ITER", 2, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 2, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    cfg = load(*DIGITS, *pairs)
    check_run(cfg)
    results = train(cfg)
    for name, kept in (("low_val", LOW), ("high_val", HIGH), ("digits_val", LOW + HIGH)):
        assert {each for each in results[name]["bbox"] if each.startswith("AP-")} == {f"AP-{each}" for each in kept}


def test_batches_say_what_their_images_annotate(load):
    cfg, annotated = load(*DIGITS), [[int(each) for each in half] for half in (LOW, HIGH)]
    check_run(cfg)
    batches = iter(build_train_loader(cfg))
    records = [*next(batches), *next(batches)]
    assert {record["dataset_source"] for record in records} == {0, 1}
    for record in records:
        assert record["annotated_classes"] == annotated[record["dataset_source"]]
        assert set(record["instances"].gt_classes.tolist()) <= set(record["annotated_classes"])

    assert next(iter(build_validation_batches(cfg, "high_val")))[0]["annotated_classes"] == annotated[1]
    assert "annotated_classes" not in next(iter(build_validation_batches(cfg, "digits_val")))[0]


def test_gradients_are_those_of_annotated_classes_alone(load):
    cfg = load(*DIGITS, "DATASETS.TRAIN", "('high_train',)", "MODEL.MASK_ON", False, config=tiny.RCNN)
    _, gradients = run_step(Trainer.build_model(cfg), next(iter(build_train_loader(cfg))))
    rows = gradients["roi_heads.box_predictor.cls_score.weight"]
    assert [bool(row.any()) for row in rows] == [False] * 5 + [True] * 6


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (NO_MAP, "only in 'low_train': '0', '1', '2', '3', '4'; only in 'high_train': 'digit 5', 'digit 6'"),
        ((*DIGITS, *NO_MAP), "'digit 5', 'digit 6', 'digit 7', 'digit 8', 'digit 9' in 'high_train'"),
        ((), "DATASETS.BNEXT.CLASS_MAP must"),
        ((*DIGITS, "MODEL.RETINANET.NUM_CLASSES", 80), "NUM_CLASSES must be 10"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_training(load, opts, named):
    with pytest.raises(ConfigError, match=named):
        check_run(load(*opts))

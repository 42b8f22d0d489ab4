"""A perfect detector has AP 100 on sets as exporters write them, or is told before any training why it cannot."""

import copy
import json

import detectron2.evaluation
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import CallbackHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from PIL import Image

from bnext.cli.train import check_run
from bnext.data.classes import relabel_records
from bnext.data.records import load_records
from bnext.engine import Trainer
from bnext.errors import DatasetError
from bnext.evaluation import build_evaluator, evaluate_model
from bnext.evaluation.compare import compare_statistics
from bnext.evaluation.leakage import evaluate_leakage
from bnext.evaluation.rehearsal import rehearse
from tests import tiny
from tests.evaluation.own_sets import SIDE, detect, edit, evaluate_perfect, load, make_set, registered, renumber

VAL = make_set(2)
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def keep(content, is_kept):
    content = copy.deepcopy(content)
    content["annotations"] = [each for each in content["annotations"] if is_kept(each)]
    return content


def add_image_ids(content, name):
    content = copy.deepcopy(content)
    for image in content["images"]:
        image["id"] = name(image["id"])
    return edit(content, image_id=lambda number, each: name(each["image_id"]))


def list_part(content):
    """Categories that occur alone, as some exporters list them."""
    content = keep(content, lambda each: each["category_id"] != 1)
    return {**content, "categories": content["categories"][1:]}


RIGHT = {
    "whole": VAL,
    "no area": edit(VAL, area=None),
    "null area": edit(VAL, area=lambda number, each: None),
    "an area of 0": edit(VAL, area=0),
    "negative areas": edit(VAL, area=-5),
    "an area in words": edit(VAL, area="16"),
    "an endless area": edit(VAL, area=float("inf")),
    "no iscrowd": edit(VAL, iscrowd=None),
    "null iscrowd": edit(VAL, iscrowd=lambda number, each: None),
    "iscrowd is a bool": edit(VAL, iscrowd=False),
    "crowds": edit(VAL, iscrowd=lambda number, each: int(number % 3 == 0)),
    "ids from 0": edit(VAL, id=lambda number, each: number),
    "ids are words": edit(VAL, id=lambda number, each: f"box {number}"),
    "ids are numbers as words": edit(VAL, id=lambda number, each: str(number)),
    "image ids are words": add_image_ids(VAL, lambda number: f"image {number}"),
    "image ids from 0": add_image_ids(VAL, lambda number: number - 1),
    "categories with gaps": renumber(VAL, (0, 17, 90)),
    "categories with long numbers": renumber(VAL, (2**70, 2**40, 2**62)),
    "images with long numbers": add_image_ids(VAL, lambda number: 2**70 + number),
    "categories numbered otherwise": renumber(VAL, (3, 1, 2)),
    "names in other letters": renumber(VAL, (2, 3, 1), ("Cat", "DOG ", "owl")),
    "a part of the categories": list_part(VAL),
    "a category more, without objects": {**VAL, "categories": [{"id": 9, "name": "none"}, *VAL["categories"]]},
    "images without objects": keep(VAL, lambda each: each["image_id"] > 2),
}


@pytest.mark.parametrize("content", RIGHT.values(), ids=RIGHT)
def test_a_perfect_detector_has_ap_100(tmp_path, bnext_log, content):
    with registered(tmp_path, val=content):
        cfg = load(tmp_path)
        rehearse(cfg, build=build_evaluator)
        results = evaluate_perfect(build_evaluator(cfg, "own_val"), content)["bbox"]

    assert results["AP"] == pytest.approx(100)
    assert results["APs"] == pytest.approx(100), "squares of less than 32 pixels are small"
    assert not np.isfinite(results["APl"])
    assert "No detector can reach" not in bnext_log.text
    assert "bbox AP 100.0" in bnext_log.text


def test_ids_that_repeat_are_other_objects(tmp_path):
    content = edit(VAL, id=7)  # in COCO's minival of 2014, which detectron2 reads
    with registered(tmp_path, val=content):
        assert evaluate_perfect(build_evaluator(load(tmp_path), "own_val"), content)["bbox"]["AP"] == pytest.approx(100)


def test_the_file_stays_and_what_is_mended_is_said_once(tmp_path, bnext_log):
    with registered(tmp_path, val=edit(VAL, area=lambda number, each: each["area"] if number % 2 else None)):
        before = (tmp_path / "val.json").read_bytes()
        for _ in range(2):
            build_evaluator(load(tmp_path), "own_val")
        assert (tmp_path / "val.json").read_bytes() == before
    assert len({id(record) for record in bnext_log.records if "(6 of 12" in record.getMessage()}) == 1


def test_a_set_that_is_a_part_of_its_file_is_evaluated_on_its_images(tmp_path):
    with registered(tmp_path, val=VAL):
        evaluator = build_evaluator(load(tmp_path), "own_val")
        evaluator.image_ids = [1, 2]
        assert evaluate_perfect(evaluator, {**VAL, "images": VAL["images"][:2]})["bbox"]["AP"] == pytest.approx(100)
        evaluator.image_ids = None
        assert evaluate_perfect(evaluator, {**VAL, "images": VAL["images"][:2]})["bbox"]["AP"] < 90


def test_classes_that_the_set_does_not_list_or_the_training_does_not_know_do_not_count(tmp_path):
    content = list_part(VAL)
    with registered(tmp_path, val=content):
        evaluator = build_evaluator(load(tmp_path), "own_val")
        evaluator.reset()
        for image in content["images"]:
            output = detect(content, image["id"])
            others = detect(content, image["id"])["instances"]
            others.pred_classes[:] = 0 if image["id"] % 2 else 8
            evaluator.process(
                [{"image_id": image["id"]}], [{"instances": type(others).cat([others, output["instances"]])}]
            )
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


# ---- sets that are functions


def as_records(content, change=lambda number, record: None):
    """Detectron2's records of a set."""
    records = []
    for number, image in enumerate(content["images"]):
        record = {"image_id": image["id"], "file_name": image["file_name"], "height": SIDE, "width": SIDE}
        record["annotations"] = []
        for each in content["annotations"]:
            if each["image_id"] == image["id"]:
                x, y, w, h = each["bbox"]
                box, mode = np.array([x, y, x + w, y + h], dtype=np.float32), BoxMode.XYXY_ABS
                record["annotations"].append({"bbox": box, "bbox_mode": mode, "category_id": each["category_id"] - 1})
        change(number, record)
        records.append(record)
    return records


def test_a_set_without_a_file_is_converted_each_time_anew(tmp_path):
    content = copy.deepcopy(VAL)
    with registered(tmp_path, val=lambda: as_records(content)):
        cfg = load(tmp_path)
        for _ in range(2):
            rehearse(cfg, build=build_evaluator)
            assert evaluate_perfect(build_evaluator(cfg, "own_val"), content)["bbox"]["AP"] == pytest.approx(100)
            assert MetadataCatalog.get("own_val").get("json_file") is None
            for annotation in content["annotations"]:
                annotation["bbox"][0] -= 2  # the labels are corrected between two evaluations


@pytest.mark.parametrize(
    "change",
    [
        lambda number, record: record.pop("image_id"),
        lambda number, record: record.update(image_id=1),
        lambda number, record: record.update(image_id=str(number) if number else 0),
        lambda number, record: record["annotations"][0].update(bbox=[1, 2, 3, 4, 30], bbox_mode=BoxMode.XYWHA_ABS),
    ],
    ids=["no image_id", "one image_id", "numbers and words", "a rotated box"],
)
def test_records_that_cannot_be_evaluated_are_named(tmp_path, change):
    records = as_records(VAL, change)
    with registered(tmp_path, val=lambda: records), pytest.raises(DatasetError, match="own_val"):
        rehearse(load(tmp_path), build=build_evaluator)


def test_ids_of_numpy_are_numbers_in_the_file_of_detections(tmp_path, bnext_log):
    records = as_records(VAL, lambda number, record: record.update(image_id=np.int64(record["image_id"])))
    with registered(tmp_path, val=lambda: records):
        rehearse(load(tmp_path), build=build_evaluator)
    assert "bbox AP 100.0" in bnext_log.text


def test_a_detectron2_evaluator_that_is_tried_leaves_no_file_behind(tmp_path):
    with registered(tmp_path, val=lambda: as_records(VAL)):
        rehearse(load(tmp_path), build=build_detectron2s)
        assert MetadataCatalog.get("own_val").get("json_file") is None


# ---- what cannot be mended


def set_first(**values):
    content = copy.deepcopy(VAL)
    content["annotations"][0].update(values)
    return content


WRONG = {
    "other names": (renumber(VAL, (1, 2, 3), ("car", "bus", "van")), "car", ()),
    "another name": (renumber(VAL, (1, 2, 3), ("cat", "dog", "eagle")), "eagle", ()),
    "iscrowd in words": (set_first(iscrowd="0"), "iscrowd", ()),
    "boxes only": (edit(VAL, segmentation=None), "MASK_ON", ("MODEL.MASK_ON", True)),
    "one without a mask": (set_first(segmentation=[]), "ids 1", ("MODEL.MASK_ON", True)),
    "a polygon of two corners": (set_first(segmentation=[[1, 1, 9, 9]]), "ids 1", ("MODEL.MASK_ON", True)),
}


@pytest.mark.parametrize(("content", "culprit", "opts"), WRONG.values(), ids=WRONG)
def test_a_cause_that_cannot_be_mended_is_named(tmp_path, content, culprit, opts):
    with registered(tmp_path, val=content), pytest.raises(DatasetError, match="own_val") as caught:
        rehearse(load(tmp_path, *opts, config=tiny.RCNN), build=build_evaluator)
    assert culprit in str(caught.value)


def test_every_evaluation_is_tried_before_the_model_is_asked(tmp_path):
    for number in range(1, 5):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{number}.png")

    with registered(tmp_path, val=WRONG["another name"][0]):
        cfg = load(tmp_path)
        trainer = Trainer(cfg)
        for attempt in (
            lambda: check_run(cfg),
            trainer.train,
            lambda: evaluate_model(cfg, None),
            lambda: compare_statistics(cfg, None),
            lambda: evaluate_leakage(cfg, None),
            lambda: build_evaluator(cfg, "own_val"),
        ):
            with pytest.raises(DatasetError, match="eagle"):
                attempt()
    assert not (tmp_path / "inference").exists()


class Evaluating(Trainer):
    """Evaluates in a way of its own."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}


def test_a_trainer_that_evaluates_in_a_way_of_its_own_is_not_tried(tmp_path):
    def begin(trainer):
        raise RuntimeError("it begins")

    with registered(tmp_path, val=WRONG["another name"][0]):
        trainer = Evaluating(load(tmp_path))
        trainer.register_hooks([CallbackHook(before_train=begin)])
        with pytest.raises(RuntimeError, match="it begins"):
            trainer.train()


def test_images_that_the_file_does_not_list_are_named(tmp_path):
    with registered(tmp_path, val=lambda: as_records(VAL)):
        part = {**VAL, "images": VAL["images"][:2]}
        (tmp_path / "part.json").write_text(json.dumps(keep(part, lambda each: each["image_id"] < 3)))
        MetadataCatalog.get("own_val").json_file = str(tmp_path / "part.json")
        with pytest.raises(DatasetError, match="image_id 3, 4, which the file does not list"):
            rehearse(load(tmp_path), build=build_evaluator)


# ---- masks and keypoints


def test_masks_are_tried(tmp_path, bnext_log):
    with registered(tmp_path, val=VAL):
        rehearse(load(tmp_path, "MODEL.MASK_ON", True, config=tiny.RCNN), build=build_evaluator)
    assert "bbox AP 100.0, segm AP 100.0" in bnext_log.text


def test_keypoints_are_tried_and_their_number_and_sigmas_are_compared(tmp_path, bnext_log):
    sigmas = ("TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]")
    on = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS")
    content = edit(VAL, num_keypoints=None)
    content["annotations"][0].update(keypoints=[0] * 9)  # none is visible
    content["annotations"][1].pop("keypoints")

    with registered(tmp_path, val=content):
        rehearse(load(tmp_path, *on, 3, *sigmas, config=tiny.RCNN), build=build_evaluator)
        for opts in ((*on, 3), (*on, 5, *sigmas), (*on, 5, "TEST.KEYPOINT_OKS_SIGMAS", "[1., 1., 1., 1., 1.]")):
            with pytest.raises(DatasetError, match="own_val"):
                rehearse(load(tmp_path, *opts, config=tiny.RCNN), build=build_evaluator)
    assert "bbox AP 100.0, segm AP 100.0, keypoints AP 100.0" in bnext_log.text


# ---- what no detector can reach


def test_the_ap_that_can_be_reached_is_said(tmp_path, bnext_log):
    many = edit(make_set(3, num_images=2, num_objects=9), category_id=1)
    with registered(tmp_path, val=many):
        rehearse(load(tmp_path, "TEST.DETECTIONS_PER_IMAGE", 6), build=build_evaluator)
    assert "bbox AP 66.3 on data set 'own_val': images with more objects than the 6" in bnext_log.text

    dense = edit(make_set(3, num_images=1, num_objects=110), category_id=1)
    with registered(tmp_path, val=dense):
        rehearse(load(tmp_path, "TEST.DETECTIONS_PER_IMAGE", 200), build=build_evaluator)
    assert "100 of a category" in bnext_log.text

    outside = edit(VAL, bbox=lambda number, each: [50, 50, 40, 40])
    with registered(tmp_path, val=outside):
        rehearse(load(tmp_path), build=build_evaluator)
    assert "reach out of their picture: 12" in bnext_log.text

    masks = edit(VAL, segmentation=lambda number, each: [[70, 70, 90, 70, 90, 90]])
    with registered(tmp_path, val=masks):
        rehearse(load(tmp_path, "MODEL.MASK_ON", True, config=tiny.RCNN), build=build_evaluator)
    assert "masks without a pixel in their picture: 12" in bnext_log.text


def test_crowds_of_a_class_that_the_training_does_not_have_do_not_count(tmp_path, bnext_log):
    herd = {**VAL["annotations"][0], "id": 999, "category_id": 9, "iscrowd": 1}
    categories = [*VAL["categories"], {"id": 9, "name": "herd"}]
    with registered(tmp_path, val={**VAL, "categories": categories, "annotations": [*VAL["annotations"], herd]}):
        cfg = load(tmp_path)
        rehearse(cfg, build=build_evaluator)
        records = relabel_records(cfg, "own_val", load_records("own_val", cfg))
    assert "bbox AP 100.0" in bnext_log.text
    assert records[0]["annotations"][-1]["iscrowd"] == 1


@pytest.mark.parametrize("edited", [edit(VAL, iscrowd=1), {**VAL, "annotations": []}], ids=["crowds", "none"])
def test_a_set_without_objects_has_no_ap_and_that_is_said(tmp_path, bnext_log, edited):
    with registered(tmp_path, val=edited):
        rehearse(load(tmp_path), build=build_evaluator)
    assert "bbox AP" not in bnext_log.text  # and that there is none is said, unless it was before


def test_a_set_without_annotations_is_passed_over(tmp_path, bnext_log):
    with registered(tmp_path, val={key: VAL[key] for key in ("images", "categories")}):
        rehearse(load(tmp_path), build=build_evaluator)
    assert "bbox AP" not in bnext_log.text


def test_a_part_of_a_large_set_is_tried(tmp_path, bnext_log):
    with registered(tmp_path, val=make_set(2, num_images=300, num_objects=1)):
        rehearse(load(tmp_path), build=build_evaluator)
    assert "bbox AP 100.0 (250 of 300 images" in bnext_log.text


# ---- evaluators of others


def build_detectron2s(cfg, name, folder):
    return detectron2.evaluation.COCOEvaluator(name, output_dir=folder)


class Foreign(DatasetEvaluator):
    def reset(self):
        pass

    def process(self, inputs, outputs):
        raise KeyError("sem_seg")


def test_evaluators_of_others_are_tried_as_far_as_they_can_be(tmp_path, bnext_log):
    with registered(tmp_path, val=edit(VAL, id=lambda number, each: number)):
        rehearse(load(tmp_path), build=build_detectron2s)
        assert "no cause is known" in bnext_log.text
        rehearse(load(tmp_path), build=lambda cfg, name, folder: Foreign())
        assert "cannot be tried with ground truth" in bnext_log.text

    for content in (renumber(VAL, (3, 1, 2)), edit(VAL, area=None)):
        with registered(tmp_path, val=content), pytest.raises(DatasetError, match="own_val"):
            rehearse(load(tmp_path), build=build_detectron2s)

"""Objects against what a model learns from them: what is refused, what is counted, and what passes."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from bnext.data.check_objects import Fault, Notice, Objects, Task, check_objects, read_boxes

WIDTH, HEIGHT = 64, 48
BOXES = [[20, 10, 12, 8], [2, 30, 20, 16], [40, 4, 20, 20], [30, 20, 30, 20], [50, 40, 10, 8], [4, 4, 50, 40]]
BOX = Task(is_training=True, is_labelled=True)
MASK = Task(is_training=True, is_labelled=True, mask_format="bitmask")
POLYGON = Task(is_training=True, is_labelled=True, mask_format="polygon")
POINTS = Task(is_training=True, is_labelled=True, num_keypoints=2)
TEST = Task(is_training=False, is_labelled=False, mask_format="bitmask")


def outline(box):
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def encode(height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[3:9, 4:17] = 1
    runs = coco_mask.encode(mask)
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def make(boxes=BOXES, *, is_xywh=True, is_filtered=True, **changed):
    """Six objects with all that there can be, on two pictures; `changed` maps a field to {index: value}."""
    number = len(boxes)
    values = {
        "iscrowd": [0] * number,
        "segmentations": [outline(box) for box in boxes],
        "keypoints": [[5, 5, 2, 9.5, 9, 1]] * number,
    }
    for name, pairs in changed.items():
        values[name] = [pairs.get(index, value) for index, value in enumerate(values[name])]

    pictures, sizes = np.arange(number) % 2, np.array([[WIDTH, HEIGHT]] * 2, dtype=float)
    array = np.array(boxes, dtype=float)
    return Objects(range(1, number + 1), pictures, sizes, array, is_xywh=is_xywh, is_filtered=is_filtered, **values)


def find(objects, task):
    """The first fault, and the notices before it."""
    notices = []
    for finding in check_objects(objects, task):
        if isinstance(finding, Fault):
            return finding, notices
        notices.append(finding)
    return None, notices


@pytest.mark.parametrize("task", [BOX, MASK, POLYGON, POINTS, TEST])
def test_whole_objects_pass(task):
    assert find(make(), task) == (None, [])


@pytest.mark.parametrize("value", ["0", "false", None, 2, [1], {}])
def test_iscrowd_that_detectron2_takes_for_a_crowd_is_refused_where_labels_are_learned(value):
    fault, _ = find(make(iscrowd={1: value, 3: value}), BOX)
    assert "iscrowd" in fault.thing
    assert "in 2 of 6, as in annotation 2" in fault.got
    assert find(make(iscrowd={1: value}), TEST)[0] is None  # the evaluator's copy is mended


@pytest.mark.parametrize("value", [True, False, 0.0, 1])
def test_iscrowd_may_be_a_truth_value(value):
    assert find(make(iscrowd={1: value}), BOX) == (None, [])


REFUSED_BOXES = {
    "corners": ([[x, y, x + width, y + height] for x, y, width, height in BOXES], "x1, y1, x2, y2"),
    "from 0 to 1": ((np.array(BOXES) / WIDTH).tolist(), "from 0 to 1"),
    "one of negative size": ([[20, 10, -12, 8], *BOXES[1:]], "negative size: annotations 1"),
    "all outside": ([[x + 1000, y, width, height] for x, y, width, height in BOXES], "outside of their picture"),
    "all flat": ([[x, y, 0, height] for x, y, _, height in BOXES], "without area"),
}


@pytest.mark.parametrize(("boxes", "message"), [pytest.param(*value, id=key) for key, value in REFUSED_BOXES.items()])
def test_boxes_of_which_nothing_right_can_follow_are_refused(boxes, message):
    fault, _ = find(make(boxes, segmentations=dict.fromkeys(range(6))), BOX)
    assert message in fault.got


COUNTED_BOXES = {
    "beyond": ([50, 20, 30, 20], "reach beyond"),
    "outside": ([64, 20, 5, 5], "outside of their picture"),
    "within a pixel": ([0.25, 0.5, 0.5, 0.25], "within the first pixel"),
    "flat": ([5, 5, 3, 0], "no area"),
}


@pytest.mark.parametrize(("box", "words"), [pytest.param(*value, id=key) for key, value in COUNTED_BOXES.items()])
def test_single_boxes_that_are_cut_off_or_left_out_are_counted(box, words):
    fault, notices = find(make([*BOXES, box]), BOX)
    assert fault is None
    (notice,) = notices
    assert (notice.count, notice.total) == (1, 7)
    assert words in notice.words
    assert " 7" in notice.words


def test_boxes_at_the_border_and_rotated_ones_pass():
    boxes = [*BOXES, [0, 0, WIDTH, HEIGHT], [60.5, 0, 4.5, 9], [np.nan] * 4]
    assert find(make(boxes, segmentations=dict.fromkeys(range(9))), BOX) == (None, [])


def test_corners_that_are_said_to_be_corners_pass():
    boxes = [[x, y, x + width, y + height] for x, y, width, height in BOXES]
    assert find(make(boxes, is_xywh=False), BOX)[0] is None


def test_objects_that_the_reader_drops_with_their_polygons_are_counted():
    flat = {0: [[1, 2, 3, 4]], 2: [[1, 2, 3, 4, 5]], 3: [[1, 2], *outline(BOXES[3])]}
    fault, notices = find(make(segmentations=flat), BOX)
    assert fault is None
    assert notices == [Notice(2, 6, "boxes", notices[0].words)]
    assert "1, 3" in notices[0].words

    fault, _ = find(make(segmentations={index: [[1, 2, 3, 4]] for index in range(6)}), BOX)
    assert "broken polygons" in fault.got

    assert find(make(segmentations=flat, is_filtered=False), BOX) == (None, [])  # nobody drops a function's records
    assert "three corners" in find(make(segmentations=flat, is_filtered=False), MASK)[0].rule


@pytest.mark.parametrize(
    "value", [[1, 2, 3, 4, 5, 6], "abc", 5, {"counts": "a"}, {"counts": ["a"], "size": [48, 64]}, np.ones((2, 2))]
)
def test_segmentations_that_the_reader_cannot_read_are_refused_for_boxes_too(value):
    assert find(make(segmentations={1: value}), BOX)[0].got.endswith("in annotation 2")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9, -1e9, "a", None, 10**400, [1]])
def test_polygons_of_odd_values_are_refused_where_masks_are_learned(value):
    objects = make(segmentations={1: [[value, 0, 5, 5, 9, 9]]})
    fault, _ = find(objects, MASK)
    assert "polygons" in fault.thing
    assert "2" in fault.got.split("annotation")[1]
    assert find(objects, BOX) == (None, [])


def test_polygons_from_0_to_1_are_refused():
    small = {index: (np.array(outline(box)) / WIDTH).tolist() for index, box in enumerate(BOXES)}
    assert "6 of 6 from 0 to 1" in find(make(segmentations=small), MASK)[0].got


def test_masks_that_are_missing_are_refused_where_they_are_learned():
    objects = make(segmentations={1: None, 2: [], 3: {}}, iscrowd={3: 1})
    assert "in 2 of 6: annotations 2, 3" in find(objects, MASK)[0].got
    assert find(objects, TEST) == (None, [])
    validated = Task(is_training=False, is_labelled=True, mask_format="bitmask")
    assert "VALIDATION_LOSS" in find(objects, validated)[0].remedy


def test_run_lengths_need_bit_masks_and_the_size_of_their_picture():
    assert find(make(segmentations={1: encode()}), MASK) == (None, [])
    assert find(make(segmentations={1: encode()}, iscrowd={1: 1}), POLYGON) == (None, [])
    assert "'bitmask'" in find(make(segmentations={1: encode()}), POLYGON)[0].remedy
    assert "[64, 48]" in find(make(segmentations={1: encode(WIDTH, HEIGHT)}), MASK)[0].got

    words = {"size": [HEIGHT, WIDTH], "counts": "hello"}
    assert "'hello'" in find(make(segmentations={1: words}), MASK)[0].got
    short = {"size": [HEIGHT, WIDTH], "counts": encode()["counts"][:-2]}
    assert "run lengths" in find(make(segmentations={1: short}), MASK)[0].rule


@pytest.mark.parametrize("seed", range(8))
def test_all_run_lengths_of_pycocotools_are_taken_for_whole(seed):
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < rng.random(), dtype=np.uint8)
    mask[:, : seed * 8] = seed % 2
    assert find(make(segmentations={0: coco_mask.encode(mask)}), MASK) == (None, [])


@pytest.mark.parametrize("value", [None, [1, 2, 2], [1, 2, 2, 3, 4, "a"], [1, 2, 2, 3, 4, float("nan")]])
def test_keypoints_are_as_many_as_the_model_learns(value):
    assert "annotation 2" in find(make(keypoints={1: value}), POINTS)[0].got


def test_crowds_need_no_keypoints():
    assert find(make(keypoints={1: None, 2: [1, 2, 2]}, iscrowd={1: 1, 2: 1}), POINTS) == (None, [])


def test_keypoints_that_the_reader_cannot_read_are_refused_for_boxes_too():
    assert "annotation 2" in find(make(keypoints={1: [1, 2, "a"]}), BOX)[0].got
    assert "annotation 2" in find(make(keypoints={1: [1, 10**400, 2]}), BOX)[0].got
    assert find(make(keypoints={1: []}), BOX) == (None, [])


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], None, [1, 2, 3, 10**400], [1, 2, 3, 1e12]])
def test_boxes_that_are_no_numbers_are_named(box):
    fault = read_boxes([BOXES[0], box], ["a", "b"])
    assert fault.got.endswith("in annotation b")


def test_boxes_may_be_of_numpys_numbers():
    boxes = [np.array(BOXES[0], dtype=np.float32), tuple(np.int64(value) for value in BOXES[1])]
    np.testing.assert_array_equal(read_boxes(boxes, [1, 2]), BOXES[:2])
    assert read_boxes([], []).shape == (0, 4)


@pytest.mark.parametrize("shift", [(-70, 0), (70, 0), (0, -50), (0, 50)])
@pytest.mark.parametrize("task", [MASK, POLYGON, TEST])
def test_polygons_outside_of_their_picture_are_counted(shift, task):
    moved = (np.array(outline(BOXES[2])).reshape(-1, 2) + shift).flatten().tolist()
    fault, notices = find(make(segmentations={2: [moved]}), task)
    assert fault is None
    assert notices == [Notice(1, 6, "polygons", notices[0].words)]
    assert "annotations 3" in notices[0].words

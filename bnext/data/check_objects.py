"""Checks of a data set's objects against what a model learns from them, whatever they were read from.

    annotations of a COCO file, or records  ->  Objects  --rules-->  faults, to refuse, and notices, to say

A rule is a function that gives what it finds, and a row of a table. Refused is what nothing right can follow from, and
what most of a set's boxes tell to be written in another way; single objects that Detectron2 cuts off or leaves out are
counted. Columns are numpy arrays: COCO's 860,000 objects are checked in less time than their file is parsed in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from bnext.errors import list_few
from bnext.numbers import is_count, is_number

__all__ = ["Fault", "Notice", "Objects", "Task", "build_segmentations", "check_objects", "has_corners", "read_boxes"]

MOST = 1e9  # pixels: what is more overflows
FAR = 10  # sides of the picture beyond which a polygon's corner is no slip of an annotator's hand
MANY = 0.15  # share of a set's boxes that reach far out of their pictures, from which on corners were meant
FEW = 3  # boxes at least that do

BOX_RULE = "be four finite numbers: x, y, width and height in pixels"
RLE_RULE = 'be run lengths {"counts": ..., "size": [height, width]} of their whole picture'


@dataclass(frozen=True)
class Fault:
    """A rule that a data set breaks, in the words of an error's message."""

    thing: str
    rule: str
    got: str
    where: str = ""  # "": the annotation file
    remedy: str = ""  # "": get the set again


@dataclass(frozen=True)
class Notice:
    """Something that is left as it is, counted."""

    count: int
    total: int
    things: str
    words: str  # after "<count> of <total> <things> of data set <name>"


@dataclass(frozen=True)
class Task:
    """The task of a model: what it wants of a data set.

    Args:
        is_training: it is trained on.
        is_labelled: its labels enter a loss; True for a training.
        num_classes: that the set may have at most, those of the model's head; None: not known, or the set is evaluated
            and its categories are found by their names.
        mask_format: INPUT.MASK_FORMAT of a model with masks; None: it has none.
        num_keypoints: of each object; None: the model has none.
        image_format: INPUT.FORMAT.
        max_side: longest side after resizing; None: not known.
        corruption: of all pictures; "": none.
    """

    is_training: bool
    is_labelled: bool
    num_classes: int | None = None
    mask_format: str | None = None
    num_keypoints: int | None = None
    image_format: str = "BGR"
    max_side: int | None = None
    corruption: str = ""

    @classmethod
    def of(cls, cfg: CfgNode | None, *, num_classes: int | None, is_training: bool) -> Task:
        """The task of a config; None: boxes."""
        if cfg is None:
            return cls(is_training, is_training, num_classes)

        resizes = is_training or cfg.INPUT.MIN_SIZE_TEST > 0
        return cls(
            is_training=is_training,
            is_labelled=is_training or cfg.TEST.BNEXT.VALIDATION_LOSS.PERIOD > 0,
            num_classes=num_classes,
            mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
            num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None,
            image_format=cfg.INPUT.FORMAT,
            max_side=(cfg.INPUT.MAX_SIZE_TRAIN if is_training else cfg.INPUT.MAX_SIZE_TEST) if resizes else None,
        )


@dataclass(frozen=True)
class Segmentations:
    """The masks of objects, sorted by their kind.

    Args:
        is_missing: of each object, whether it has none.
        is_dropped: whether all of its polygons are such as Detectron2's reader drops, and the object with them.
        polygons: that are kept.
        owners: the object of each of those.
        runs: objects with run lengths.
    """

    is_missing: np.ndarray
    is_dropped: np.ndarray
    polygons: list[Any]
    owners: np.ndarray
    runs: list[int]


@dataclass(frozen=True)
class Objects:
    """All objects of a data set. N objects, P pictures.

    Args:
        ids: N names of objects, for messages.
        pictures: [N], the picture of each.
        sizes: [P, 2], width and height.
        boxes: [N, 4], x, y, width and height in pixels; NaN where a box is of another kind (rotated).
        is_xywh: whether they are written so, too.
        is_filtered: whether Detectron2's reader of COCO files reads them, which drops objects with broken polygons.
        iscrowd: N values as they were written.
        segmentations, keypoints: N values as they were written; None: there is none.
    """

    ids: Sequence[Any]
    pictures: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    is_xywh: bool
    is_filtered: bool
    iscrowd: list[Any]
    segmentations: list[Any]
    keypoints: list[Any]

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, indices: Iterable[int]) -> str:
        return list_few([self.ids[index] for index in indices])


def check_objects(objects: Objects, task: Task) -> Iterator[Fault | Notice]:
    """Faults of objects, in the order of the rules; whoever raises a fault need not ask for the next.

    Args:
        objects: of a data set that has some.
        task: what the model wants of them.
    """
    yield from _find_odd_crowd(objects, task)
    is_crowd = np.array([value not in (0, None) for value in objects.iscrowd], dtype=bool)

    segmentations = yield from build_segmentations(objects)
    for rule in BOX_RULES:
        yield from rule(objects, is_crowd, segmentations, task)

    if task.mask_format is not None:
        for rule in MASK_RULES:
            yield from rule(objects, is_crowd, segmentations, task)
    yield from _find_unreadable_keypoints(objects)
    if task.num_keypoints is not None and task.is_labelled:
        yield from _find_odd_keypoints(objects, is_crowd, task)


def read_boxes(boxes: Sequence[Any], ids: Sequence[Any]) -> np.ndarray | Fault:
    """[N, 4] of boxes as they were written; the fault of the first that is none."""
    array = _stack_numbers(boxes, 4)
    if array is None:
        for box, name in zip(boxes, ids, strict=True):
            if _measure(box) != 4 or not all(map(is_number, box)):
                return Fault("The bbox of annotations", BOX_RULE, f"{_shorten(box)} in annotation {name}")
        array = np.array(boxes, dtype=np.float64).reshape(-1, 4)

    odd = np.flatnonzero(np.abs(array).max(axis=1, initial=0) > MOST).tolist()
    if odd:
        return Fault("The bbox of annotations", BOX_RULE, f"{_shorten(boxes[odd[0]])} in annotation {ids[odd[0]]}")
    return array


def _stack_numbers(lists: Sequence[Any], length: int) -> np.ndarray | None:
    """[N, length] of lists of so many finite numbers of Python's; None: only a look at each can tell what they are."""
    if not set(map(_measure, lists)) <= {length} or not set(map(type, chain.from_iterable(lists))) <= {int, float}:
        return None
    try:
        array = np.array(lists, dtype=np.float64).reshape(len(lists), length)
    except OverflowError:  # a whole number beyond the range of floats
        return None
    return array if np.isfinite(array).all() else None


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _measure(value: Any) -> int:
    return len(value) if _is_list(value) else -1


def _shorten(value: object, most: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def _list(mask: np.ndarray) -> list[int]:
    return [int(index) for index in np.flatnonzero(mask)]


# ---- crowds


def _find_odd_crowd(objects: Objects, task: Task) -> Iterator[Fault]:
    """Detectron2 takes everything that does not equal 0 for a crowd, and trains on none: "0" and null, too."""
    if not task.is_labelled:
        return

    odd = [index for index, value in enumerate(objects.iscrowd) if value not in (0, 1)]
    if odd:
        values = {_shorten(objects.iscrowd[index], 20) for index in odd}
        yield Fault(
            "The iscrowd of annotations",
            "be 0 or 1",
            f"{list_few(sorted(values))} in {len(odd)} of {len(objects)}, as in annotation {objects.name(odd[:1])}",
            remedy="Write 0 for single objects and 1 for crowds, or leave the key out: detectron2 would take them for "
            "crowds and train on none of them.",
        )


# ---- boxes, called as rule(objects, is_crowd, segmentations, task)


def _find_negative_boxes(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault]:
    negative = _list(objects.boxes[:, 2:].min(axis=1) < 0)
    if negative:
        box = [float(value) for value in objects.boxes[negative[0]]]
        yield Fault(
            "The boxes",
            "have a width and a height of 0 or more",
            f"{len(negative)} of {len(objects)} of negative size: annotations {objects.name(negative)}; the first is "
            f"x, y, width, height = {box}",
            remedy="Write the upper left corner first, in the order that the box's mode asks for.",
        )


def _find_normalized_boxes(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault | Notice]:
    x, y, width, height = objects.boxes.T
    is_within_pixel: np.ndarray = (
        (width > 0) & (height > 0) & (x >= 0) & (y >= 0) & (x + width <= 1.01) & (y + height <= 1.01)
    )
    is_within_pixel &= (objects.sizes[objects.pictures] > 2).all(axis=1)
    within = _list(is_within_pixel)

    if len(within) > max(1, len(objects) / 2):
        yield Fault(
            "The boxes",
            "be in pixels",
            f"{len(within)} of {len(objects)} from 0 to 1: annotations {objects.name(within)}",
            remedy="Multiply x and width by the width of the picture, y and height by its height.",
        )
    elif within:
        words = f"lie within the first pixel of their picture, as if from 0 to 1: annotations {objects.name(within)}"
        yield Notice(len(within), len(objects), "boxes", words)


def _find_boxes_elsewhere(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault | Notice]:
    x, y, width, height = objects.boxes.T
    pictures = objects.sizes[objects.pictures]
    x_end, y_end = x + width, y + height
    beyond_x, beyond_y = np.maximum(-x, x_end - pictures[:, 0]), np.maximum(-y, y_end - pictures[:, 1])

    is_outside = ~_overlap_pictures(objects) & (width > 0) & (height > 0)
    is_beyond = (beyond_x > np.maximum(1, 0.01 * pictures[:, 0])) | (beyond_y > np.maximum(1, 0.01 * pictures[:, 1]))
    is_beyond &= ~is_outside

    is_far = (beyond_x > 0.05 * pictures[:, 0]) | (beyond_y > 0.05 * pictures[:, 1])
    are_corners = (x > -1) & (width >= x) & (width < pictures[:, 0] + 1)
    are_corners &= (y > -1) & (height >= y) & (height < pictures[:, 1] + 1)

    far = _list(is_far)
    if objects.is_xywh and are_corners.mean() >= 0.99 and len(far) >= max(FEW, MANY * len(objects)):
        yield Fault(
            "The boxes",
            "be x, y, width and height",
            f"x1, y1, x2, y2, as it seems: so all would lie in their pictures, of which {len(far)} of {len(objects)} "
            f"reach far out: annotations {objects.name(far)}",
            remedy="Subtract x1 from x2 and y1 from y2.",
        )

    outside, beyond = _list(is_outside), _list(is_beyond)
    if outside:
        words = f"lie outside of their picture and are left out by detectron2: annotations {objects.name(outside)}"
        yield Notice(len(outside), len(objects), "boxes", words)
    if beyond:
        words = f"reach beyond their picture and are cut off at its border: annotations {objects.name(beyond)}"
        yield Notice(len(beyond), len(objects), "boxes", words)


def _find_lost_boxes(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault | Notice]:
    is_flat = objects.boxes[:, 2:].min(axis=1) == 0
    is_outside = ~_overlap_pictures(objects)

    flat, dropped = _list(is_flat), _list(segmentations.is_dropped)
    if flat:
        words = f"have no area and are left out by detectron2: annotation ids {objects.name(flat)}"
        yield Notice(len(flat), len(objects), "boxes", words)
    if dropped:
        words = (
            "are left out by detectron2, as no polygon of theirs has three corners, also where no masks are trained "
            f"on: annotations {objects.name(dropped)}; without a `segmentation` their boxes would count"
        )
        yield Notice(len(dropped), len(objects), "boxes", words)

    if task.is_training and not (~(is_crowd | is_flat | is_outside | segmentations.is_dropped)).any():
        got = f"{len(objects)}, all of them crowds, without area, outside of their picture or with broken polygons"
        yield Fault("The annotations", "leave something to train on", got)


def _overlap_pictures(objects: Objects) -> np.ndarray:
    x, y, width, height = objects.boxes.T
    pictures = objects.sizes[objects.pictures]
    is_apart = (x >= pictures[:, 0]) | (y >= pictures[:, 1]) | (x + width <= 0) | (y + height <= 0)
    return ~is_apart


BOX_RULES: tuple[Callable[..., Iterator[Fault | Notice]], ...] = (
    _find_negative_boxes,
    _find_normalized_boxes,
    _find_boxes_elsewhere,
    _find_lost_boxes,
)


# ---- masks


def build_segmentations(objects: Objects) -> Generator[Fault, None, Segmentations]:
    """The masks of objects by their kinds; yields what Detectron2's reader could not read at all."""
    is_missing = np.zeros(len(objects), dtype=bool)
    is_dropped = np.zeros(len(objects), dtype=bool)
    polygons: list[Any] = []
    owners: list[int] = []
    runs: list[int] = []

    for index, value in enumerate(objects.segmentations):
        if not isinstance(value, np.ndarray) and not value:
            is_missing[index] = True
        elif isinstance(value, dict):
            runs.append(index)
            if not _are_runs(value.get("counts"), value.get("size")):
                yield _name_odd_runs(objects, index)
        elif not isinstance(value, list) or not all(map(_is_list, value)):
            yield Fault(
                "The segmentation of annotations",
                "be a list of polygons, each a list of x, y, x, y, ..., or run lengths",
                f"{_shorten(value)} in annotation {objects.name([index])}",
                remedy="Write [[x, y, x, y, ...]], also for a single polygon.",
            )
        else:
            kept = [polygon for polygon in value if has_corners(polygon)] if objects.is_filtered else value
            polygons += kept
            owners += [index] * len(kept)
            is_dropped[index] = not kept

    return Segmentations(is_missing, is_dropped, polygons, np.array(owners, dtype=np.int64), runs)


def _are_runs(counts: Any, size: Any) -> bool:
    """Whether the reader can take them for run lengths; whether they are right, it does not ask."""
    if not _is_list(size) or len(size) != 2 or not all(is_count(side) and side > 0 for side in size):
        return False
    if _is_list(counts):
        return all(map(is_count, counts)) and bool(sum(counts) == size[0] * size[1])
    return isinstance(counts, (str, bytes))


def has_corners(polygon: Sequence[Any]) -> bool:
    """Whether a polygon x, y, x, y, ... has three corners or more, without which COCO's tools make no pixels of it."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def _name_odd_runs(objects: Objects, index: int) -> Fault:
    return Fault(
        "The segmentation of annotations",
        RLE_RULE,
        f"{_shorten(objects.segmentations[index])} in annotation {objects.name([index])}",
        remedy="Write them with pycocotools.mask.encode, counts as text; or write polygons.",
    )


# ---- masks that are learned or evaluated, called as rule(objects, is_crowd, segmentations, task)


def _find_missing_masks(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault]:
    missing = _list(segmentations.is_missing & ~is_crowd)
    if missing and task.is_labelled:
        yield Fault(
            "The annotations",
            "have a segmentation where masks are trained on",
            f"none in {len(missing)} of {len(objects)}: annotations {objects.name(missing)}",
            remedy=_name_way_out("Add the masks, or train on boxes alone: MODEL.MASK_ON False", task),
        )


def _find_short_polygons(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault]:
    pairs = zip(segmentations.polygons, segmentations.owners.tolist(), strict=True)
    short = [owner for polygon, owner in pairs if not has_corners(polygon)]
    if short:
        yield Fault(
            "The polygons of annotations",
            "be x and y of three corners or more",
            f"{len(short)} with fewer, or half of one: annotations {objects.name(short)}",
            remedy="Correct or remove them.",
        )


def _find_runs_for_polygons(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault]:
    runs = [index for index in segmentations.runs if not is_crowd[index]]
    if runs and task.is_labelled and task.mask_format == "polygon":
        yield Fault(
            "The segmentation of annotations",
            "be polygons where INPUT.MASK_FORMAT is 'polygon'",
            f"run lengths in {len(runs)} of {len(objects)}: annotations {objects.name(runs)}",
            remedy="Set INPUT.MASK_FORMAT to 'bitmask'.",
        )


def _find_odd_runs(objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task) -> Iterator[Fault]:
    for index in segmentations.runs:
        value = objects.segmentations[index]
        height, width = value["size"]

        if not np.array_equal(objects.sizes[objects.pictures[index]], (width, height)):
            picture = " x ".join(f"{side:g}" for side in objects.sizes[objects.pictures[index]])
            yield Fault(
                "The segmentation of annotations",
                f"be run lengths of their whole picture, {picture}",
                f"[height, width] = {[height, width]} in annotation {objects.name([index])}",
                remedy="Encode the mask at the size of the picture; a mask of another size would be stretched.",
            )
        counts = value["counts"]
        if not _is_list(counts) and _sum_runs(counts) != height * width:
            yield _name_odd_runs(objects, index)


def _sum_runs(counts: str | bytes) -> int | None:
    """Pixels that COCO's compressed run lengths cover; None: they are none.

    A run is a signed number in groups of five bits, low ones first, 48 + 32 (unless it is the last) + group; from the
    fourth run on it is the difference to the run before the last.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        return None

    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(groups) == 0 or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None

    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        return None

    place = np.arange(len(groups)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 31) << (5 * place), starts)
    runs -= np.where(groups[ends] & 16, 1 << (5 * lengths), 0)  # the sign

    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if (runs >= 0).all() else None


def _find_odd_polygons(
    objects: Objects, is_crowd: np.ndarray, segmentations: Segmentations, task: Task
) -> Iterator[Fault | Notice]:
    polygons, owners = segmentations.polygons, segmentations.owners
    if not polygons:
        return

    try:
        lows, highs, sums = (np.array(list(map(take, polygons)), dtype=float) for take in (min, max, sum))
    except (TypeError, ValueError, OverflowError):  # words among them, or lists
        for polygon, owner in zip(polygons, owners, strict=True):
            if not all(is_number(value) for value in polygon):
                got = f"{_shorten(polygon)} in annotation {objects.name([owner])}"
                yield Fault("The polygons of annotations", "be finite numbers, x, y, x, y, ...", got)
        return

    odd = owners[~np.isfinite(sums)]
    if len(odd):
        got = f"{len(odd)} polygons with other values: annotations {objects.name(odd)}"
        yield Fault("The polygons of annotations", "be finite numbers, x, y, x, y, ...", got)

    pictures = objects.sizes[objects.pictures[owners]]
    sides = pictures.max(axis=1)
    is_far = np.maximum(-lows, highs) > FAR * sides
    far = owners[is_far]
    if len(far):
        farthest = np.maximum(-lows, highs).max()
        yield Fault(
            "The polygons of annotations",
            f"have their corners in their picture, or near: within {FAR} of its sides",
            f"{len(far)} far outside, at up to {farthest:g}: annotations {objects.name(far)}",
            remedy="Correct or remove them: the memory that they are drawn in grows with their distance.",
        )

    # Few can lie outside; of those each axis is looked at.
    outside = [
        int(owners[index])
        for index in np.flatnonzero((lows <= 0) | (highs >= pictures.min(axis=1)))
        if _lies_outside(polygons[index], *pictures[index])
    ]
    if outside:
        words = f"lie outside of their picture, and give no mask: annotations {objects.name(outside)}"
        yield Notice(len(outside), len(polygons), "polygons", words)

    is_normalized = (lows >= 0) & (highs <= 1.01) & (sides > 2)
    if is_normalized.sum() > max(1, len(owners) / 2):
        yield Fault(
            "The polygons of annotations",
            "be in pixels",
            f"{int(is_normalized.sum())} of {len(owners)} from 0 to 1: annotations "
            f"{objects.name(owners[is_normalized])}",
            remedy="Multiply x by the width of the picture, y by its height.",
        )


def _lies_outside(polygon: Sequence[float], width: float, height: float) -> bool:
    x, y = polygon[::2], polygon[1::2]
    return max(x) <= 0 or min(x) >= width or max(y) <= 0 or min(y) >= height


MASK_RULES: tuple[Callable[..., Iterator[Fault | Notice]], ...] = (
    _find_missing_masks,
    _find_short_polygons,
    _find_runs_for_polygons,
    _find_odd_runs,
    _find_odd_polygons,
)


def _name_way_out(remedy: str, task: Task) -> str:
    return f"{remedy}." if task.is_training else f"{remedy}; or set TEST.BNEXT.VALIDATION_LOSS.PERIOD to 0."


# ---- keypoints


def _find_unreadable_keypoints(objects: Objects) -> Iterator[Fault]:
    """Detectron2's reader adds to them, whatever is trained on."""
    given = [index for index, value in enumerate(objects.keypoints) if value is not None and (_is_list(value) or value)]
    lists = [objects.keypoints[index] for index in given]
    if all(map(_is_list, lists)) and set(map(type, chain.from_iterable(lists))) <= {int, float}:
        try:
            np.fromiter(chain.from_iterable(lists), dtype=np.float64)
        except OverflowError:  # a whole number beyond the range of floats
            pass
        else:
            return

    for index, value in zip(given, lists, strict=True):
        if not _is_list(value) or not all(map(is_number, value)):
            got = f"{_shorten(value)} in annotation {objects.name([index])}"
            yield Fault("The keypoints of annotations", "be a list of numbers", got)


def _find_odd_keypoints(objects: Objects, is_crowd: np.ndarray, task: Task) -> Iterator[Fault]:
    length = 3 * (task.num_keypoints or 0)
    indices = _list(~is_crowd)
    if _stack_numbers([objects.keypoints[index] for index in indices], length) is not None:
        return

    for index in indices:
        value = objects.keypoints[index]
        if _measure(value) != length or not all(is_number(number) for number in value):
            yield Fault(
                "The annotations",
                f"have {task.num_keypoints} keypoints, each as x, y and visibility, where keypoints are trained on",
                f"{_shorten(value)} in annotation {objects.name([index])}",
                remedy=_name_way_out(
                    "Write 0, 0, 0 for keypoints that are not known, or correct MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
                    task,
                ),
            )

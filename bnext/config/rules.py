"""Values that detectron2's own keys allow: what it would assert, or take memory for, when the training has begun.

A row holds for every key whose last words it names. What a key means to a model, such as a backbone's depth, is
checked by whoever builds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.meta_arch.build import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.semantic_seg import SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.roi_heads.keypoint_head import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY

from bnext.config.keys import Values
from bnext.config.places import LEVEL_ARCHITECTURES, PLACES, RCNN_ARCHITECTURES
from bnext.errors import ConfigError
from bnext.numbers import is_number
from bnext.text import suggest

__all__ = ["check_detectron2_keys"]


def _count(low: int, high: int, remedy: str = "Choose a number from there.") -> Values:
    return Values(
        f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high, remedy
    )


def _number(low: float, high: float = math.inf, remedy: str = "Choose a number from there.") -> Values:
    words = f"a number of {low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
    return Values(words, lambda value: is_number(value) and low <= value <= high, remedy)


def _between(low: float, high: float = math.inf) -> Values:
    words = f"a number above {low:g}" + ("" if high == math.inf else f" and below {high:g}")
    return Values(words, lambda value: is_number(value) and low < value < high, "Choose a number from there.")


def _word(*words: str) -> Values:
    return Values(f"one of {', '.join(map(repr, words))}", lambda value: value in words, names=words)


def _list_of(item: Values, *lengths: int) -> Values:
    number = f" of {' or '.join(map(str, lengths))}" if lengths else ""

    def accepts(value: Any) -> bool:
        is_list = isinstance(value, (list, tuple)) and (not lengths or len(value) in lengths)
        return is_list and all(item.accepts(one) for one in value)

    return Values(f"a list{number}, each {item.words}", accepts, "Correct the list.")


def _of_levels(item: Values) -> Values:
    """A list for all levels, or one of each."""
    flat = _not_empty(_list_of(item))
    nested = _not_empty(_list_of(flat))
    return Values(
        f"{flat.words}, or a list of such lists",
        lambda value: isinstance(value, (list, tuple)) and (flat.accepts(value) or nested.accepts(value)),
        flat.remedy,
    )


def _not_empty(values: Values) -> Values:
    return Values(
        f"{values.words}, and not empty", lambda value: values.accepts(value) and len(value) > 0, values.remedy
    )


def _ascending(values: Values) -> Values:
    def accepts(value: Any) -> bool:
        return values.accepts(value) and all(low < high for low, high in zip(value[:-1], value[1:], strict=True))

    return Values(f"{values.words}, in ascending order", accepts, "Put them in order, each once.")


_CHANNELS = _count(1, 65_536)
_LAYERS = _count(0, 1000)
_CLASSES = _count(1, 100_000, "Set it to the number of categories of the data set.")
_SHARE = _number(0, 1)
_PIXELS = _count(1, 65_536)
_SIDE = _count(0, 65_536, "0 leaves pictures as they are.")  # of the shorter edge
_RESOLUTION = _count(1, 1024)
_PERIOD = _count(0, 2**63 - 1, "0 is for never.")
_NAMES = _list_of(Values("a name", lambda value: isinstance(value, str) and value != ""))
_LOSS = _number(0)

# Last words of keys -> the values that they allow.
_RULES: dict[str, Values] = {
    "MODEL.PIXEL_MEAN": _not_empty(_list_of(_number(-math.inf))),
    "MODEL.PIXEL_STD": _not_empty(_list_of(_between(0))),
    "BACKBONE.FREEZE_AT": _count(0, 100, "0 freezes nothing."),
    "IN_FEATURES": _NAMES,
    "OUT_FEATURES": _NAMES,
    "OUT_CHANNELS": _CHANNELS,
    "CONV_DIM": _CHANNELS,
    "CONVS_DIM": _CHANNELS,
    "FC_DIM": _CHANNELS,
    "WIDTH_PER_GROUP": _CHANNELS,
    "NUM_GROUPS": _CHANNELS,
    "RES2_OUT_CHANNELS": _CHANNELS,
    "STEM_OUT_CHANNELS": _CHANNELS,
    "ROI_KEYPOINT_HEAD.CONV_DIMS": _list_of(_CHANNELS),
    "RPN.CONV_DIMS": _not_empty(
        _list_of(Values("-1 or a number of channels", lambda value: value == -1 or _CHANNELS.accepts(value)))
    ),
    "NUM_CONV": _LAYERS,
    "NUM_CONVS": _LAYERS,
    "NUM_FC": _LAYERS,
    "RESNETS.DEPTH": _count(1, 10_000),
    "RES5_DILATION": _count(1, 2),
    "FPN.FUSE_TYPE": _word("sum", "avg"),
    "NUM_CLASSES": _CLASSES,
    "NUM_KEYPOINTS": _count(1, 10_000),
    "ANCHOR_GENERATOR.SIZES": _of_levels(_between(0)),
    "ANCHOR_GENERATOR.ASPECT_RATIOS": _of_levels(_between(0)),
    "ANCHOR_GENERATOR.OFFSET": Values("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
    "PROPOSAL_GENERATOR.MIN_SIZE": _number(0),
    "IOU_THRESHOLDS": _ascending(_list_of(_SHARE)),
    "IOU_LABELS": _list_of(Values("-1, 0 or 1", lambda value: value in (-1, 0, 1))),
    "BBOX_REG_WEIGHTS": _list_of(_between(0), 4, 5),  # 5 of rotated boxes
    "ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _not_empty(_list_of(_list_of(_between(0), 4, 5))),
    "ROI_BOX_CASCADE_HEAD.IOUS": _not_empty(_list_of(_SHARE)),
    "BATCH_SIZE_PER_IMAGE": _count(1, 1_000_000),
    "POSITIVE_FRACTION": _SHARE,
    "NMS_THRESH": _SHARE,
    "NMS_THRESH_TEST": _SHARE,
    "SCORE_THRESH_TEST": _SHARE,
    "OVERLAP_THRESH": _SHARE,
    "INSTANCES_CONFIDENCE_THRESH": _SHARE,
    "SMOOTH_L1_BETA": _LOSS,
    "SMOOTH_L1_LOSS_BETA": _LOSS,
    "LOSS_WEIGHT": _LOSS,
    "PRE_NMS_TOPK_TRAIN": _count(1, 10_000_000),
    "PRE_NMS_TOPK_TEST": _count(1, 10_000_000),
    "POST_NMS_TOPK_TRAIN": _count(1, 10_000_000),
    "POST_NMS_TOPK_TEST": _count(1, 10_000_000),
    "TOPK_CANDIDATES_TEST": _count(1, 10_000_000),
    "POOLER_RESOLUTION": _RESOLUTION,
    "POOLER_SAMPLING_RATIO": _count(0, 64, "0 adapts to the size of a RoI."),
    "POOLER_TYPE": _word("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated"),
    "COMMON_STRIDE": Values("one of 1, 2, 4, 8, 16, 32, 64", lambda value: value in (1, 2, 4, 8, 16, 32, 64)),
    "PRIOR_PROB": _between(0, 1),
    "FOCAL_LOSS_GAMMA": _LOSS,
    "FOCAL_LOSS_ALPHA": _number(-1, 1, "-1 weighs all alike."),
    "MIN_SIZE_TRAIN": _not_empty(_list_of(_SIDE)),
    "MIN_SIZE_TEST": _SIDE,
    "MAX_SIZE_TRAIN": _PIXELS,
    "MAX_SIZE_TEST": _PIXELS,
    "AUG.MIN_SIZES": _not_empty(_list_of(_PIXELS)),
    "AUG.MAX_SIZE": _PIXELS,
    "MIN_SIZE_TRAIN_SAMPLING": _word("choice", "range"),
    "INPUT.RANDOM_FLIP": _word("horizontal", "vertical", "none"),
    "CROP.TYPE": _word("relative_range", "relative", "absolute", "absolute_range"),
    "CROP.SIZE": _list_of(_between(0), 2),
    "INPUT.MASK_FORMAT": _word("polygon", "bitmask"),
    "INPUT.FORMAT": _word("BGR", "RGB", "L", "YUV-BT.601", "HSV", "LAB", "YCbCr"),
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "DATALOADER.NUM_WORKERS": _count(0, 1024, "0 loads in the training's own process; 2 to 8 are usual."),
    "SOLVER.MAX_ITER": _count(1, 10**9, "To evaluate alone, give --eval-only."),
    "SOLVER.BASE_LR": _number(0),
    "SOLVER.MOMENTUM": Values("a number from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1),
    "SOLVER.WEIGHT_DECAY": _number(0),
    "SOLVER.WEIGHT_DECAY_NORM": _number(0),
    "SOLVER.WEIGHT_DECAY_BIAS": Values(
        "a number of 0 or more, or None", lambda value: value is None or (is_number(value) and value >= 0)
    ),
    "SOLVER.BIAS_LR_FACTOR": _number(0),
    "SOLVER.GAMMA": _number(0),
    "SOLVER.STEPS": _ascending(_list_of(_count(1, 2**63 - 1))),
    "SOLVER.WARMUP_FACTOR": _number(0),
    "SOLVER.WARMUP_ITERS": _count(0, 2**63 - 1),
    "SOLVER.WARMUP_METHOD": _word("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": _count(0, 2**63 - 1, "0 saves the last one alone."),
    "SOLVER.IMS_PER_BATCH": _count(1, 100_000, "16 is usual; it is the number of images of a step, over all workers."),
    "SOLVER.REFERENCE_WORLD_SIZE": _count(0, 100_000, "0 scales nothing."),
    "SOLVER.BNEXT.VIRTUAL_IMAGES": _count(0, 100_000, "0 is for none."),
    "BBOX_REG_LOSS_TYPE": _word("smooth_l1", "giou", "diou", "ciou"),
    "CLIP_GRADIENTS.CLIP_TYPE": _word("value", "norm"),
    "CLIP_GRADIENTS.CLIP_VALUE": _between(0),
    "CLIP_GRADIENTS.NORM_TYPE": Values("a number above 0, or inf", lambda value: value > 0),
    "TEST.EVAL_PERIOD": _PERIOD,
    "TEST.DETECTIONS_PER_IMAGE": Values(
        "a whole number from 1 to 1000000, or -1 for all",
        lambda value: type(value) is int and (value == -1 or 1 <= value <= 1_000_000),
        "COCO's AP counts 100.",
    ),
    "PRECISE_BN.NUM_ITER": _count(0, 10_000_000),
    "VIS_PERIOD": _PERIOD,
    "SEED": _count(-1, 2**32 - 1, "-1 draws one."),
}

# Key of a name -> those that are registered.
_REGISTRIES = {
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
_OWN_NAMES = {"MODEL.PROPOSAL_GENERATOR.NAME": ["PrecomputedProposals"], "MODEL.ROI_BOX_HEAD.NAME": [""]}


def check_detectron2_keys(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Refuse values of detectron2's keys that no training and no evaluation can do with.

    Args:
        values: whole name -> value, of a whole config.
        names: key -> the name by which the user knows it, where that is another.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    names = names or {}
    _check_architecture(values["MODEL.META_ARCHITECTURE"])

    for name, value in values.items():
        rule = _find_rule(name)
        if rule is not None and not rule.accepts(value):
            remedy = suggest(value, rule.names, rule.remedy)
            thing = names.get(name, name)
            raise ConfigError.of(thing, f"be {rule.words}", got=repr(value), where="config", remedy=remedy)
        _check_plain(name, value)

    _check_registered(values)
    _check_pairs(values)


def _find_rule(name: str) -> Values | None:
    """The rule of the longest of its last words that has one."""
    words = name.split(".")
    for number in range(len(words)):
        rule = _RULES.get(".".join(words[number:]))
        if rule is not None:
            return rule
    return None


def _check_plain(name: str, value: Any) -> None:
    """Refuse numbers that are none, and text that no file can be named by."""
    if isinstance(value, float) and not math.isfinite(value) and ".BNEXT." not in name and name not in _FREE:
        raise ConfigError.of(name, "be a finite number", got=repr(value), where="config", remedy="Choose one.")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError.of(name, "be text", got=repr(value), where="config", remedy="Take the zero byte out.")


_FREE = ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",)  # inf is the largest gradient


def _check_architecture(name: str) -> None:
    known = [registered for registered, _ in META_ARCH_REGISTRY]
    if name not in known:
        remedy = suggest(name, known, f"Choose one of {', '.join(sorted(known))}.")
        raise ConfigError.of(
            "MODEL.META_ARCHITECTURE",
            "name a registered architecture",
            got=repr(name),
            where="config",
            remedy=f"{remedy} One of your own must be imported first.",
        )


def _check_registered(values: Mapping[str, Any]) -> None:
    """Refuse a part that nobody has registered, of those that the architecture builds."""
    architecture = f"BNext{values['MODEL.META_ARCHITECTURE'].removeprefix('BNext')}"  # which have the same parts
    if architecture not in PLACES["FPN"].architectures:
        return  # which parts it builds is its own affair

    has_rois, is_dense = architecture in RCNN_ARCHITECTURES, architecture in LEVEL_ARCHITECTURES
    has_proposals = architecture in PLACES["RPN"].architectures
    has_rpn = has_proposals and values["MODEL.PROPOSAL_GENERATOR.NAME"] == "RPN"
    is_built = {
        "MODEL.ANCHOR_GENERATOR.NAME": has_rpn or is_dense,
        "MODEL.PROPOSAL_GENERATOR.NAME": has_proposals,
        "MODEL.RPN.HEAD_NAME": has_rpn,
        "MODEL.ROI_HEADS.NAME": has_rois,
        "MODEL.ROI_BOX_HEAD.NAME": has_rois,
        "MODEL.ROI_MASK_HEAD.NAME": has_rois and values["MODEL.MASK_ON"],
        "MODEL.ROI_KEYPOINT_HEAD.NAME": has_rois and values["MODEL.KEYPOINT_ON"],
        "MODEL.SEM_SEG_HEAD.NAME": architecture in PLACES["SEM_SEG_HEAD"].architectures,
    }

    for name, registry in _REGISTRIES.items():
        known = [*(registered for registered, _ in registry), *_OWN_NAMES.get(name, [])]
        if is_built.get(name, True) and values[name] not in known:
            remedy = suggest(values[name], known, f"Choose one of {', '.join(sorted(filter(None, known)))}.")
            remedy = f"{remedy} One of your own must be imported first."
            raise ConfigError.of(name, "be a registered name", got=repr(values[name]), where="config", remedy=remedy)


def _check_pairs(values: Mapping[str, Any]) -> None:
    """Refuse keys that go together and do not."""
    for node in ("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.RETINANET"):
        thresholds, labels = values[f"{node}.IOU_THRESHOLDS"], values[f"{node}.IOU_LABELS"]
        if len(labels) != len(thresholds) + 1:
            rule = f"be one more than the {len(thresholds)} of {node}.IOU_THRESHOLDS"
            remedy = "Give each interval between thresholds its label."
            raise ConfigError.of(f"{node}.IOU_LABELS", rule, got=repr(labels), where="config", remedy=remedy)

    mean, std = values["MODEL.PIXEL_MEAN"], values["MODEL.PIXEL_STD"]
    if len(mean) != len(std):
        rule, remedy = f"be as many as the {len(mean)} of MODEL.PIXEL_MEAN", "Give one of each channel of INPUT.FORMAT."
        raise ConfigError.of("MODEL.PIXEL_STD", rule, got=repr(std), where="config", remedy=remedy)

    sizes, sampling = values["INPUT.MIN_SIZE_TRAIN"], values["INPUT.MIN_SIZE_TRAIN_SAMPLING"]
    if sampling == "range" and len(sizes) != 2:
        rule = "be two where INPUT.MIN_SIZE_TRAIN_SAMPLING is 'range'"
        remedy = "Give the smallest and the largest one, or set the sampling to 'choice'."
        raise ConfigError.of("INPUT.MIN_SIZE_TRAIN", rule, got=repr(sizes), where="config", remedy=remedy)

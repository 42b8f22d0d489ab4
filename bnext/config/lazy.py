"""A LazyConfig as a CfgNode: detectron2's convention of names for them, in the keys that everything else reads.

    train.max_iter = 90000                 ->  SOLVER.MAX_ITER: 90000
    dataloader.train.dataset.names = "x"   ->  DATASETS.TRAIN: ("x",)
    model, optimizer, lr_multiplier, dataloader.*.mapper  ->  LAZY: the file, and what it holds

The nodes of the third line are instantiated by `heads.lazy_model`, `engine.optimizer` and `data.mapping`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from omegaconf import DictConfig, ListConfig, OmegaConf

from bnext.config.check import flatten
from bnext.config.merge import convert_value, merge_pairs
from bnext.config.places import LAZY_ARCHITECTURE
from bnext.errors import ConfigError, Refusal, list_few
from bnext.lazy_config import copy_node, find_target, name_target, read_lazy_file
from bnext.lazy_config.nodes import LAZY, keep
from bnext.lazy_config.overrides import list_names
from bnext.notices import tell_once
from bnext.text import find_near

__all__ = ["merge_lazy", "tell_unheeded"]

log = logging.getLogger(__name__)

# Name in a LazyConfig -> key.
_KEYS = {
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.output_dir": "OUTPUT_DIR",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.device": "MODEL.DEVICE",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.seed": "SEED",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.train.aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
    "dataloader.train.dataset.names": "DATASETS.TRAIN",
    "dataloader.train.dataset.filter_empty": "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "dataloader.train.dataset.min_keypoints": "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE",
    "dataloader.train.mapper.instance_mask_format": "INPUT.MASK_FORMAT",
    "dataloader.test.dataset.names": "DATASETS.TEST",
    "dataloader.evaluator.kpt_oks_sigmas": "TEST.KEYPOINT_OKS_SIGMAS",
    "model.roi_heads.keypoint_head.num_keypoints": "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    "model.roi_heads.box_predictor.test_topk_per_image": "TEST.DETECTIONS_PER_IMAGE",
    "model.max_detections_per_image": "TEST.DETECTIONS_PER_IMAGE",
    "model.pixel_mean": "MODEL.PIXEL_MEAN",
    "model.pixel_std": "MODEL.PIXEL_STD",
    "model.backbone.stages.depth": "MODEL.RESNETS.DEPTH",
    "model.backbone.stages.stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "model.backbone.bottom_up.stages.depth": "MODEL.RESNETS.DEPTH",
    "model.backbone.bottom_up.stages.stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "model.input_format": "INPUT.FORMAT",
    "dataloader.train.mapper.image_format": "INPUT.FORMAT",
}
_CALLS = ("model", "dataloader", "optimizer", "lr_multiplier")
_CONVENTION = (*_CALLS, "train", "norms", "keys")
_CLASSES = ("model.num_classes", "model.roi_heads.num_classes")
# Whoever wrote one of these has what it says, or would have the same without it.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "train.ddp.broadcast_buffers": (False,),
    "train.checkpointer.max_to_keep": (100,),
    "train.log_period": (20,),
    "dataloader.train.dataset._target_": (get_detection_dataset_dicts,),
    "dataloader.test.dataset._target_": (get_detection_dataset_dicts,),
    "dataloader.test.dataset.filter_empty": (False,),
    "dataloader.test.batch_size": (1,),
    "dataloader.evaluator.output_dir": (None,),
}
_HEEDED = ("train.ddp.find_unused_parameters", "train.ddp.fp16_compression")
# Keys of a CfgNode that have an effect; of others it is said where a LazyConfig has the same.
_FREE: tuple[str, ...] = (
    "OUTPUT_DIR",
    "SEED",
    "CUDNN_BENCHMARK",
    "VIS_PERIOD",
    "DATASETS.",
    "DATALOADER.",
    "TEST.",
    "MODEL.WEIGHTS",
)
_FREE += ("MODEL.DEVICE", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.AMP.")
_FREE += ("SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.BNEXT.")
_INSTEAD = {
    "MODEL.BNEXT.": "norms.<PLACE>.<KEY>=..., such as norms.FPN.NORM=SyncBN",
    "MODEL.": "model.<...>=...",
    "INPUT.": "dataloader.train.mapper.<...>=... and dataloader.test.mapper.<...>=...",
    "SOLVER.": "optimizer.<...>=... and lr_multiplier.<...>=...",
}

_NO_MODEL = Refusal(ConfigError, "The LazyConfig {file}", "have a `model`, such as L(RetinaNet)(...)", "{remedy}")
_NO_CALL = Refusal(
    ConfigError,
    "{name}",
    "be a call of {target}, which bnext puts its own in the place of",
    "Register the data set (DatasetCatalog.register, or register_coco_instances) and name it there.",
)
_NO_MAPPER = Refusal(
    ConfigError,
    "dataloader.{part}.mapper",
    "be there where data sets are named to {part}",
    "Take detectron2's common/data/coco.py as a base, or add L(DatasetMapper)(is_train={is_train}, augmentations=[], "
    "image_format='BGR').",
)
_NO_EFFECT = Refusal(ConfigError, "{key}", "be left out with a LazyConfig, where it has no effect", "Write {instead}.")


def merge_lazy(cfg: CfgNode, file: str, words: Sequence[str]) -> dict[str, str]:
    """Fill a config from a LazyConfig and what overrides it.

    Args:
        cfg: of `get_cfg` and `add_bnext_config`; is changed.
        file: the LazyConfig, whose code runs.
        words: `key=value` of the LazyConfig, and KEY VALUE pairs of what Detectron2's and bnext's keys add to it.

    Returns:
        Key -> the name by which the user knows it, for errors.

    Raises:
        ConfigError: see `read_lazy_file`; there is no model, or a value or pair is not allowed.
    """
    file = os.path.abspath(os.path.expanduser(file))
    overrides, pairs = _split(words)
    config = read_lazy_file(file, overrides, _CALLS, known=(*_KEYS, *_HEEDED, "norms.*"))
    values = keep(file, config)

    _check_model(config, file)
    defaults = cfg.clone()
    names = _take_values(cfg, config, defaults, file)
    _take_sizes(cfg, config)
    _check_data(config, file)

    pairs = [*_read_keys(config, file), *pairs]
    merge_pairs(cfg, pairs, defaults)
    for key in map(str, pairs[::2]):
        _check_effect(key)
        names.pop(key, None)
    _check_mappers(cfg, config, file)

    cfg.MODEL.META_ARCHITECTURE = LAZY_ARCHITECTURE
    cfg[LAZY] = CfgNode(
        {
            "FILE": file,
            "OVERRIDES": list(overrides),
            "CLASSES": _find_classes(config),
            "NORMS": _read_norms(config),
            "VALUES": values,
        }
    )
    return names


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the LazyConfig, and KEY VALUE pairs; a key in capitals is of a pair, with "=" as well."""
    overrides: list[str] = []
    pairs: list[str] = []
    waiting = list(map(str, words))

    while waiting:
        word = waiting.pop(0)
        key, sign, value = word.partition("=")
        is_of_pairs = key.partition(".")[0].isupper()
        if sign and not is_of_pairs:
            overrides.append(word)
        elif sign:
            pairs += [key, value]
        elif is_of_pairs or not waiting:
            pairs += [word, *waiting[:1]]
            del waiting[:1]
        else:
            overrides.append(f"{word}={waiting.pop(0)}")
    return overrides, pairs


def _check_model(config: DictConfig, file: str) -> None:
    if find_target(config.get("model")) is not None:
        return

    names = [str(name) for name in config]
    near = find_near("model", names, most=1)
    got = f"one that is no call, {config.model!r}" if "model" in config else list_few(names, 8) or "nothing"
    remedy = f"Did you mean {near[0]}? Rename it." if near and "model" not in names else "Define it, or import one: "
    if remedy.endswith(": "):
        remedy += 'model = model_zoo.get_config("common/models/retinanet.py").model.'
    raise _NO_MODEL.of(got, file=file, remedy=remedy)


def _take_values(cfg: CfgNode, config: DictConfig, defaults: CfgNode, file: str) -> dict[str, str]:
    """Put the values of the convention under their keys; key -> its name in the LazyConfig."""
    names = {}
    values = flatten(defaults)
    for name, key in _KEYS.items():
        value = _read(config, name)
        if value is None and name != "train.init_checkpoint":
            continue
        value = _to_plain(value)
        if name.startswith("model.") and type(value) is not type(values[key]):
            continue  # a model of somebody's own may take what it likes
        if isinstance(values[key], tuple) and isinstance(value, str):
            value = (value,)
        *path, last = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        node[last] = convert_value(name, "" if value is None else value, values[key], file)
        names[key] = name

    heads = config.model.get("roi_heads") or {}
    cfg.MODEL.MASK_ON = isinstance(heads, DictConfig) and heads.get("mask_head") is not None
    cfg.MODEL.KEYPOINT_ON = isinstance(heads, DictConfig) and heads.get("keypoint_head") is not None
    return names


def _read(config: Any, name: str) -> Any:
    """The value of a name; None where it, or a part of its way, is not there."""
    for part in name.split("."):
        if not isinstance(config, DictConfig) or config.get(part) is None:
            return None
        config = config[part]
    return config


def _to_plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value


def _take_sizes(cfg: CfgNode, config: DictConfig) -> None:
    """The sizes of images, by which pictures are checked that would vanish; 65,536 where no augmentation says."""
    for part in ("train", "test"):
        resize: Any = None
        for each in _read(config, f"dataloader.{part}.mapper.augmentations") or ():
            resize = each if find_target(each) is T.ResizeShortestEdge else resize

        shortest = (_to_plain(resize.get("short_edge_length")) or 0) if resize is not None else 0
        longest = resize.get("max_size", 65_536) if resize is not None else 65_536
        cfg.INPUT[f"MAX_SIZE_{part.upper()}"] = min(longest, 65_536)
        if part == "train":
            cfg.INPUT.MIN_SIZE_TRAIN = (shortest,) if isinstance(shortest, int) else tuple(shortest)
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = resize.get("sample_style", "range") if resize is not None else "choice"
            if isinstance(shortest, int):
                cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        else:
            cfg.INPUT.MIN_SIZE_TEST = shortest if isinstance(shortest, int) else max(shortest)


def _find_classes(config: DictConfig) -> list[Any]:
    """The name of the classes that the model predicts, and their number; empty: not known."""
    for name in _CLASSES:
        value = _read(config, name)
        if isinstance(value, int):
            return [name, value]
    return []


def _read_norms(config: DictConfig) -> CfgNode:
    """The nodes of `norms`, each as in MODEL.BNEXT; where a head sees several levels, with their names."""
    norms = _to_plain(config.get("norms")) or {}
    if not isinstance(norms, dict) or not all(isinstance(node, dict) for node in norms.values()):
        rule, remedy = "be a dict of places and their keys", 'Write norms = dict(FPN=dict(NORM="SyncBN")).'
        raise ConfigError.of("norms", rule, got=repr(norms), remedy=remedy)

    levels = {"RETINANET": "model.head_in_features", "RPN": "model.proposal_generator.in_features"}
    nodes = CfgNode()
    for place, node in norms.items():
        known = _read(config, levels.get(place, ""))
        nodes[place] = CfgNode({**node, **({} if known is None else {"LEVELS": tuple(known)})})
    return nodes


def _read_keys(config: DictConfig, file: str) -> list[Any]:
    """KEY VALUE KEY VALUE ... of the file's `keys`, those that a LazyConfig has no name for."""
    pairs: list[Any] = []
    waiting = [("", _to_plain(config.get("keys")) or {})]
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}".lstrip("."), each) for key, each in value.items()]
        elif not name:
            rule, remedy = "be a dict", 'Write keys = {"TEST.PRECISE_BN.ENABLED": True}.'
            raise ConfigError.of("keys", rule, got=repr(value), where=file, remedy=remedy)
        else:
            pairs += [name, value]
    return pairs


def _check_data(config: DictConfig, file: str) -> None:
    """Refuse loaders that bnext cannot put its own in the place of: the sets of others have no name."""
    expected: Mapping[str, Any] = {
        "dataloader.train": build_detection_train_loader,
        "dataloader.test": build_detection_test_loader,
        "dataloader.train.dataset": get_detection_dataset_dicts,
        "dataloader.test.dataset": get_detection_dataset_dicts,
    }
    for name, target in expected.items():
        node = _read(config, name)
        if node is not None and find_target(node) is not target:
            got = f"one of {name_target(node)}" if find_target(node) is not None else repr(_to_plain(node))
            raise _NO_CALL.of(got, file, name=name, target=f"detectron2's {target.__name__}")


def _check_mappers(cfg: CfgNode, config: DictConfig, file: str) -> None:
    for part in ("train", "test"):
        if cfg.DATASETS[part.upper()] and _read(config, f"dataloader.{part}.mapper") is None:
            has_one = "dataloader" in config
            got = "none" if has_one else "no dataloader"
            raise _NO_MAPPER.of(got, file, part=part, is_train=part == "train")


def _check_effect(key: str) -> None:
    if any(key == free or (free.endswith(".") and key.startswith(free)) for free in _FREE):
        return
    instead = next((text for start, text in _INSTEAD.items() if key.startswith(start)), "what it says into the file")
    raise _NO_EFFECT.of(f"{key} beside one", key=key, instead=instead)


def tell_unheeded(cfg: CfgNode) -> None:
    """Say which names of a LazyConfig have no effect, once.

    Args:
        cfg: of the LazyConfig. Whoever builds the model says it, into the log of the training.
    """
    config, file = copy_node(cfg), cfg.LAZY.FILE
    others = [str(name) for name in config if name not in _CONVENTION]
    missing = [name for name in _CONVENTION if name not in config]
    for name in others:
        near = find_near(name, missing, most=1, cutoff=0.8)
        if near:
            tell_once(log, (file, name), "%s of %s has no effect. Did you mean %s?", name, file, near[0])

    unheeded = []
    for top in ("train", "dataloader"):
        for name in list_names(config.get(top), f"{top}."):
            value = _read(config, name)
            is_taken = name in _KEYS or name in _HEEDED or ".mapper" in name or isinstance(value, DictConfig)
            if value is not None and not is_taken and value not in _WITHOUT_EFFECT.get(name, (None,)):
                unheeded.append(name)
    unheeded = [name for name in unheeded if not name.startswith("dataloader.evaluator")]
    unheeded = [name for name in unheeded if name != "dataloader.test.num_workers"]
    if unheeded:
        message = "%s of %s %s no effect: bnext's trainer and loaders have no such choice."
        verb = "has" if len(unheeded) == 1 else "have"
        tell_once(log, (file, *unheeded), message, list_few(unheeded, 8), file, verb)

    _tell_evaluator(config, file)


def _tell_evaluator(config: DictConfig, file: str) -> None:
    node = _read(config, "dataloader.evaluator")
    evaluators = list(node) if isinstance(node, ListConfig) else [node]
    others = [each for each in evaluators if each is not None and find_target(each) is not COCOEvaluator]
    if others:
        names = ", ".join(name_target(each) for each in others)
        message = "dataloader.evaluator of %s (%s) has no effect: bnext evaluates with COCO's metrics, by an evaluator "
        message += "of its own."
        tell_once(log, (file, names), message, file, names)

"""When a box head learns its image: sets of pictures that differ more and more, heads trained on one frozen trunk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from rcnn_features import CachedImage, cache_images
from rcnn_heads import ARMS, build_detector, estimate_populations, measure_ap, set_arm, train_head
from rcnn_share import measure_shares

from bnext.checkpoints import load_model
from bnext.config.load import load_config
from bnext.data.digits import FOLDER, prepare_digits
from bnext.data.digits_images import DigitsRecipe
from bnext.data.listed_sets import register_listed_sets
from bnext.engine import train
from bnext.errors import ConfigError, check_choice
from bnext.studies.runner import find_final_model
from bnext.studies.trials import Trial, run_trials, using_threads

__all__ = ["RcnnSetting", "name_sets", "run_heads"]

TRUNK = Path(__file__).parent / "configs" / "rcnn" / "trunk.yaml"
SPLITS = ("train", "val")
TOP_PROPOSALS = 50  # of an image at test
SHARE_IMAGES = 100  # that the shares are measured on


@dataclasses.dataclass(frozen=True)
class RcnnSetting:
    """The settings.

    Args:
        styles: of each set, how much its pictures differ in palette and contrast, 0 to 1; see `DigitsRecipe`.
        classes: of each set, different digits in a picture at most.
        arms: norms of the heads, see `ARMS`.
        num_train, num_val: pictures of a set.
        trunk_steps: of the trunk's training, 4 images each.
        steps: of a head's training.
        images: in a step, one for each of so many workers.
        rois: of an image in a step.
        rate: AdamW's.
        channels: of the head's four convolutions.
    """

    styles: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.5, 1.0])
    classes: list[int] = dataclasses.field(default_factory=lambda: [10, 10, 10])
    arms: list[str] = dataclasses.field(default_factory=lambda: list(ARMS))
    num_train: int = 500
    num_val: int = 200
    trunk_steps: int = 900
    steps: int = 800
    images: int = 4
    rois: int = 64
    rate: float = 0.001
    channels: int = 32

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("arms", arm, tuple(ARMS), where="the settings")
        if len(self.styles) != len(self.classes):
            got, remedy = f"{len(self.styles)} and {len(self.classes)}", "Give one of each for every set."
            raise ConfigError.of("styles and classes", "be equally many", got=got, remedy=remedy)
        if self.images < 2:
            remedy = "With a single image all arms but GN are the same."
            raise ConfigError.of("images", "be 2 or more", got=self.images, remedy=remedy)


def name_sets(setting: RcnnSetting) -> dict[str, DigitsRecipe]:
    """Name -> recipe of every set."""
    sets = {}
    for style, classes in zip(setting.styles, setting.classes, strict=True):
        recipe = DigitsRecipe(
            num_train=setting.num_train, num_val=setting.num_val, image_style=style, image_classes=classes
        )
        sets[f"style_{style:g}_classes_{classes}"] = recipe
    return sets


def run_heads(setting: RcnnSetting, output: str, seeds: Sequence[int], *, resume: bool = False) -> dict[str, Any]:
    """Make the sets, train the trunk (or take the one that is there), train and measure the heads.

    Args:
        setting: see there.
        output: folder of the study; the sets go to `output`/sets, the trunk to `output`/trunk.
        seeds: of the heads; there is one trunk.
        resume: keep what is finished.

    Returns:
        See `run_trials`; trials are "SET/ARM", with AP by each kind of statistics, the loss of the last tenth of the
        steps and, of heads that were trained on single images, the shares of `measure_shares`.
    """
    sets = name_sets(setting)
    for name, recipe in sets.items():
        prepare_digits(Path(output, "sets", name), recipe)
    cfg = load_trunk(setting, output, sets)

    if not (resume and Path(find_final_model(cfg)).is_file()):
        with using_threads(1):
            train(cfg, resume=resume)

    @functools.lru_cache(maxsize=len(sets))
    def load_images(name: str) -> dict[str, list[CachedImage]]:
        """Split -> images of a set, after the trunk."""
        model = load_model(cfg, find_final_model(cfg))
        return {split: cache_images(cfg, model, f"{name}_{split}") for split in SPLITS}

    trials: dict[str, Trial] = {}
    for name in sets:
        for arm in setting.arms:
            trials[f"{name}/{arm}"] = functools.partial(_run_trial, setting, cfg, load_images, name, arm)
    return run_trials(trials, output, seeds=seeds, setting=setting, resume=resume)


def load_trunk(setting: RcnnSetting, output: str, sets: Mapping[str, DigitsRecipe]) -> CfgNode:
    """The config of the trunk, which is trained on the sets of the least and the largest style, all classes or few."""
    cfg = load_config(str(TRUNK), ["OUTPUT_DIR", str(Path(output, "trunk"))]).clone()
    cfg.defrost()

    for name in sets:
        folder = Path(output, "sets", name, FOLDER).absolute()
        for split in SPLITS:
            file = str(folder / "annotations" / f"instances_{split}.json")
            entry = {"name": f"{name}_{split}", "json": file, "folder": str(folder / split)}
            cfg.DATASETS.BNEXT.COCO.append(entry)

    by_style = sorted(sets, key=lambda name: sets[name].image_style)
    ends = dict.fromkeys((by_style[0], by_style[-1]))
    cfg.DATASETS.TRAIN = tuple(f"{name}_train" for name in ends)
    cfg.DATASETS.TEST = (f"{by_style[-1]}_val",)
    cfg.SOLVER.MAX_ITER = setting.trunk_steps
    register_listed_sets(cfg)
    return cfg


def _run_trial(
    setting: RcnnSetting,
    cfg: CfgNode,
    load_images: Callable[[str], dict[str, list[CachedImage]]],
    name: str,
    arm: str,
    seed: int,
) -> dict[str, Any]:
    images = load_images(name)
    cfg = _set_head(setting, cfg, arm)
    model = build_detector(cfg, seed)
    losses = train_head(cfg, model, images["train"], seed)

    test = functools.partial(measure_ap, cfg, model, images["val"], f"{name}_val")
    last = losses[-max(len(losses) // 10, 1) :]
    numbers: dict[str, Any] = {"loss": sum(last) / len(last)}
    if arm == "gn":
        return {**numbers, "none": test("population")}

    numbers["moving_average"] = test("population")
    estimate_populations(cfg, model, images["train"], seed)
    numbers["population"] = test("population")
    numbers["mini_batch"] = test("mini_batch")
    if arm == "one_image":
        numbers["share"] = measure_shares(model, images["train"][:SHARE_IMAGES], seed)
    return numbers


def _set_head(setting: RcnnSetting, cfg: CfgNode, arm: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = setting.rois
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = setting.channels
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = TOP_PROPOSALS
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = setting.images, setting.steps, setting.rate
    return set_arm(cfg, arm)

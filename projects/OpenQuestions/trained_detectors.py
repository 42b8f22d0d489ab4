"""The trainings of the study: their configs and folders, and each trained once."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from torch import nn

from bnext.cli.train import check_run
from bnext.engine.trainer import train
from bnext.errors import ConfigError, check_choice
from bnext.evaluation.coco import evaluate_model, flatten_metrics
from bnext.studies.runner import find_final_model, load_row, prepare_folder

__all__ = ["HEADS", "ROIS", "OpenSetting", "Trainings", "evaluate", "list_groups"]

CONFIGS = Path(__file__).parent / "configs"
# From one mini-batch of all levels to one for each: the trainings of a RetinaNet.
HEADS = ("shared", "two_groups", "three_groups", "per_level")
ROIS = "rois"


@dataclasses.dataclass(frozen=True)
class OpenSetting:
    """Settings of the study.

    Args:
        trainings: folder of their configs, in configs/.
        num_batches: of a re-estimation, of as many images as in training.
        shares: steps from the populations of a training (0) to those of each level (1).
        images: N, from which a head is repaired; 2 or more, as a level may have one value in an image.
        num_draws: of N images.
        opts: KEY VALUE pairs that override every config.
    """

    trainings: str = "digits"
    num_batches: int = 50
    shares: list[float] = dataclasses.field(default_factory=lambda: [0, 0.25, 0.5, 0.75, 1])
    images: list[int] = dataclasses.field(default_factory=lambda: [2, 8, 32])
    num_draws: int = 3
    opts: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        folders = [path.name for path in CONFIGS.iterdir() if path.is_dir()]
        check_choice("trainings", self.trainings, tuple(sorted(folders)), where="the settings")

        rules = [
            ("num_batches", self.num_batches >= 2, "be 2 or more", "Use 50."),
            ("shares", all(0 <= share <= 1 for share in self.shares), "be from 0 to 1", "Use [0,0.5,1]."),
            ("images", all(number >= 2 for number in self.images), "be 2 or more", "Use [2,8,32]."),
            ("num_draws", self.num_draws >= 1, "be 1 or more", "Use 3."),
        ]
        for name, holds, rule, remedy in rules:
            if not holds:
                raise ConfigError.of(name, rule, got=getattr(self, name), where="the settings", remedy=remedy)


class Trainings:
    """The trainings of a study, each with its seed and its folder in that of the study.

    Args:
        setting: of the study.
        output: its folder.
        resume: whether those that are there are kept, and unfinished ones gone on with.
    """

    def __init__(self, setting: OpenSetting, output: str, resume: bool = False) -> None:
        self.setting, self.output, self.resume = setting, output, resume
        self._finished: set[str] = set()  # in this run

    def load(self, name: str, seed: int) -> CfgNode:
        """The config of a training."""
        file = CONFIGS / self.setting.trainings / f"{name}.yaml"
        folder = os.path.join("trainings", f"{name}_seed{seed}")
        return load_row(str(file), self.output, folder, ["SEED", str(seed), *self.setting.opts])

    def check(self, names: tuple[str, ...], seed: int) -> None:
        """Refuse configs, data sets and folders that are wrong, before anything runs."""
        for name in names:
            check_run(self.load(name, seed), 1)

    def find(self, name: str, seed: int) -> tuple[CfgNode, str]:
        """Config and weights of a training, which is run unless it is finished."""
        cfg = self.load(name, seed)
        weights = find_final_model(cfg)

        is_there = self.resume and os.path.exists(weights)
        if is_there:
            _check_trained(cfg)
        if cfg.OUTPUT_DIR not in self._finished and not is_there:
            prepare_folder(cfg, self.resume)
            train(cfg, resume=self.resume)
        self._finished.add(cfg.OUTPUT_DIR)
        return cfg, weights


def _check_trained(cfg: CfgNode) -> None:
    """Refuse a finished training of another model or schedule, which parts of the study share."""
    file = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    with open(file) as stream:
        there, wanted = yaml.safe_load(stream), yaml.safe_load(cfg.dump())

    if there["SOLVER"] != wanted["SOLVER"] or there["MODEL"]["RETINANET"] != wanted["MODEL"]["RETINANET"]:
        rule, remedy = "be of the same setting, to be taken", "Leave --resume away, or choose another --output."
        raise ConfigError.of("The training", rule, got="another SOLVER or MODEL", where=file, remedy=remedy)


def list_groups(cfg: CfgNode) -> list[list[str]]:
    """Groups of levels that share a mini-batch in a training; a level in none is alone."""
    node = cfg.MODEL.BNEXT.RETINANET
    return [list(cfg.MODEL.RETINANET.IN_FEATURES)] if node.STATISTICS == "shared" else node.LEVEL_GROUPS


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """COCO AP, and that of small, medium and large objects; None for a size without objects."""
    metrics = flatten_metrics(evaluate_model(cfg, model))
    return {name: metrics.get(f"bbox/{name}") for name in ("AP", "APs", "APm", "APl")}

"""Every config file is plain YAML, is accepted, and builds its model."""

import contextlib
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from bnext.config import load_config, resolve_norms
from bnext.config.places import PLACES
from bnext.errors import ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec
from bnext.layers.walk import find_bnext_norms
from tests.stock import load_stock_config

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT) for folder in ("configs", "projects") for path in ROOT.glob(f"{folder}/**/*.yaml")
)
# Of detectors; the others are the settings of a study, which are read by `bnext.studies.setting`.
CONFIGS = [path for path in FILES if "_BASE_" in (text := (ROOT / path).read_text()) or "\nMODEL:" in f"\n{text}"]
SETTINGS = [path for path in FILES if path not in CONFIGS]
RCNN, MASK_RCNN = "configs/COCO-Detection/faster_rcnn", "configs/COCO-InstanceSegmentation/"
TWO_STAGE = (RCNN, MASK_RCNN, "configs/COCO-PanopticSegmentation/")
PARTS = {
    "RESNETS": "backbone.bottom_up.",
    "FPN": "backbone.fpn_",
    "ROI_BOX_HEAD": "roi_heads.box_head.",
    "ROI_MASK_HEAD": "roi_heads.mask_head.",
}


def test_there_are_configs():
    assert len(CONFIGS) >= 26
    assert {path.parts[0] for path in SETTINGS} == {"projects"}


@pytest.mark.parametrize("ours", [path for path in CONFIGS if str(path).startswith(TWO_STAGE)], ids=str)
def test_a_two_stage_recipe_is_detectron2s_but_for_its_norms(ours):
    """Its namesake without the norm; convolutions of the box head come with their norm."""
    stem = ours.stem.removesuffix("_SyncBN").removesuffix("_GhostBN")
    cfg, stock = load_config(str(ROOT / ours)), load_stock_config(f"{ours.parent.name}/{stem}.yaml")
    for section in ("INPUT", "DATASETS", "DATALOADER"):
        assert {key: value for key, value in cfg[section].items() if key not in ("BNEXT", "DOMAINS")} == stock[section]
    assert {key for key, value in stock.SOLVER.items() if cfg.SOLVER[key] != value} == set()
    for key, value in stock.MODEL.items():
        if isinstance(value, dict):
            changed = {name for name in value if cfg.MODEL[key][name] != value[name]}
            assert changed <= {"NORM", *(("NUM_CONV", "NUM_FC") if key == "ROI_BOX_HEAD" else ())}
        elif key not in ("META_ARCHITECTURE", "WEIGHTS", "DEVICE"):
            assert cfg.MODEL[key] == value


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_is_safe_yaml_and_builds(path):
    yaml.safe_load((ROOT / path).read_text())
    cfg = load_config(str(ROOT / path), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    norms = [module for module in model.modules() if isinstance(module, LevelBatchNorm2d)]
    num_towers = 2 * cfg.MODEL.RETINANET.NUM_CONVS if cfg.MODEL.RETINANET.NORM else 0
    assert len(norms) == num_towers + bool(cfg.MODEL.BNEXT.RPN.NORM)
    places = resolve_norms(cfg).places
    for place in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        asked = places[place].norm if place in places else ""
        found = {module.spec for path, module in find_bnext_norms(model).items() if path.startswith(PARTS[place])}
        assert found == ({asked} if isinstance(asked, NormSpec) else set())
    if path.stem.startswith("table5_row"):
        assert {norm.spec.table5_row for norm in norms} == {int(path.stem[-1])}


NORMS = ("BN", "SyncBN", "GN", "LN", "FrozenBN", "")


def sweep(path):
    """The config with each norm in each of its places: (place, norm, config)."""
    for place in resolve_norms(load_config(str(ROOT / path))).places:
        for norm in NORMS:
            yield place, norm, load_config(str(ROOT / path), [PLACES[place].norm, norm, "MODEL.DEVICE", "meta"])


# With keys of a place that some norm has no use for.
CHANGED = ("retinanet_R_18_FPN_BN", "faster_rcnn_R_50_FPN_1x_GhostBN", "table3_6_shuffle_2", "table5_row6")


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem in CHANGED and "coco" not in path.parts], ids=str
)
def test_every_norm_of_the_command_line_is_taken(path):
    for place, norm, cfg in sweep(path):
        recipe = resolve_norms(cfg).places[place]
        assert recipe.name == norm
        assert recipe.is_batch_norm or recipe.changed == ()


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if "3x" not in path.stem], ids=str)
def test_every_norm_of_the_command_line_builds_in_every_config(path):
    """But a norm in a box head that has linear layers alone, which says so."""
    for place, norm, cfg in sweep(path):
        has_norm = place != "ROI_BOX_HEAD" or cfg.MODEL.ROI_BOX_HEAD.NUM_CONV > 0
        expected = contextlib.nullcontext() if has_norm or not norm else pytest.raises(ConfigError, match="NUM_CONV")
        with expected, torch.device("meta"):
            build_model(cfg)


def test_coco_study_has_the_papers_schedule():
    cfg = load_config(str(ROOT / "projects/RethinkingBatchNorm/configs/coco/table5_row1.yaml"))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (16, 0.01, 270_000)
    assert (cfg.MODEL.RETINANET.NORM, cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("SyncBN", "FrozenBN", 2)
    assert cfg.TEST.PRECISE_BN.NUM_ITER * solver.IMS_PER_BATCH == 4000

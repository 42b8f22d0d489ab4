"""Every config file is plain YAML, is accepted, and builds its model."""

from pathlib import Path

import pytest
import yaml
from detectron2.modeling import build_model

from bnext.engine import load_config
from bnext.layers import LevelBatchNorm2d

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT) for folder in ("configs", "projects") for path in ROOT.glob(f"{folder}/**/*.yaml")
)


def test_there_are_configs():
    assert len(CONFIGS) >= 17


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_is_safe_yaml_and_builds(path):
    yaml.safe_load((ROOT / path).read_text())
    cfg = load_config(str(ROOT / path), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    norms = [module for module in model.modules() if isinstance(module, LevelBatchNorm2d)]
    assert len(norms) == (2 * cfg.MODEL.RETINANET.NUM_CONVS if cfg.MODEL.RETINANET.NORM else 0)
    if path.stem.startswith("table5_row"):
        assert {norm.spec.table5_row for norm in norms} == {int(path.stem[-1])}


def test_coco_study_has_the_papers_schedule():
    cfg = load_config(str(ROOT / "projects/RethinkingBatchNorm/configs/coco/table5_row1.yaml"))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (16, 0.01, 270_000)
    assert (cfg.MODEL.RETINANET.NORM, cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("SyncBN", "FrozenBN", 2)
    assert cfg.TEST.PRECISE_BN.NUM_ITER * solver.IMS_PER_BATCH == 4000

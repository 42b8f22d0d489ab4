"""SOLVER.OPTIMIZER: which optimizer, and what it does to norms."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from bnext.config import add_bnext_config
from bnext.engine.optimizer import build_optimizer
from bnext.errors import ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec


def make_cfg(**solver):
    cfg = get_cfg()
    add_bnext_config(cfg)
    for key, value in {"WEIGHT_DECAY": 0.05, "WEIGHT_DECAY_NORM": 0.0, **solver}.items():
        cfg.SOLVER[key] = value
    return cfg


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)])
@pytest.mark.parametrize("row", [1, 6])
def test_norms_of_every_row_are_spared_weight_decay(name, kind, row):
    norm = LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(row))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    optimizer = build_optimizer(make_cfg(OPTIMIZER=name, BASE_LR=0.003), model)
    assert isinstance(optimizer, kind)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in norm.parameters()} == {0.0}
    assert decay[id(model[0].weight)] == 0.05
    assert {group["lr"] for group in optimizer.param_groups} == {0.003}


def test_gradients_are_clipped_for_adamw():
    cfg = make_cfg(OPTIMIZER="ADAMW")
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    model = nn.Linear(3, 1)
    optimizer = build_optimizer(cfg, model)
    (1000 * model(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert all(p.grad.norm() <= 1.0001 for p in model.parameters())


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER"):
        build_optimizer(make_cfg(OPTIMIZER="LION"), nn.Linear(3, 1))

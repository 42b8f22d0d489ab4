"""Whose fault it is: a config's, where detectron2 itself cannot build it; never what other people's code raises."""

import errno
import os

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver.build import build_lr_scheduler
from torch import nn, optim

from bnext.config.blame import building_from_config
from bnext.errors import ConfigError, DatasetError


class OfAUser(nn.Module):
    error: Exception = KeyError("day")

    def __init__(self, cfg):
        raise self.error


@pytest.fixture
def cfg():
    META_ARCH_REGISTRY._do_register("OfAUser", OfAUser)
    yield get_cfg()
    META_ARCH_REGISTRY._obj_map.pop("OfAUser")


@pytest.mark.parametrize(
    "error", [KeyError("day"), AssertionError("mine"), ValueError("mine"), OSError(errno.ENOSPC, "full")]
)
def test_what_a_users_own_part_raises_is_no_fault_of_the_config(cfg, error, monkeypatch):
    monkeypatch.setattr(OfAUser, "error", error)
    cfg.MODEL.META_ARCHITECTURE = "OfAUser"
    with pytest.raises(type(error)) as raised, building_from_config():
        build_model(cfg)
    assert raised.value is error


def test_what_the_system_raises_is_no_fault_of_the_config(tmp_path):
    with pytest.raises(FileNotFoundError), building_from_config():
        os.listdir(tmp_path / "absent")
    with pytest.raises(DatasetError), building_from_config():
        raise DatasetError("ours")


def test_what_detectron2_refuses_is_and_names_the_function_that_did():
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.DEPTH = "cpu", 51
    with pytest.raises(ConfigError, match=r"51 \(detectron2\..*build_resnet_backbone"), building_from_config():
        build_model(cfg)

    cfg.SOLVER.LR_SCHEDULER_NAME = "Cosinus"
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="Cosinus"), building_from_config():
        build_lr_scheduler(cfg, optimizer)

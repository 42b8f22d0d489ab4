"""What is said when a model is built: once, with the key that mends it, and never of a healthy one."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm

import bnext.heads.build_warnings as build_warnings
from bnext import notices
from bnext.heads.build_warnings import building_unwarned, warn_of_faults
from tests import tiny

ROW_3 = ("MODEL.BNEXT.RETINANET.STATISTICS", "per_level", "MODEL.BNEXT.RETINANET.AFFINE", "shared")
ENOUGH = ("SOLVER.IMS_PER_BATCH", 16)  # for a batch norm
HEALTHY = {
    "row 1": ("MODEL.BNEXT.RETINANET.STATISTICS", "shared", "MODEL.BNEXT.RETINANET.AFFINE", "shared"),
    "row 4": (*ROW_3, "MODEL.BNEXT.RETINANET.POPULATION", "per_level"),
    "row 6": ("MODEL.BNEXT.RETINANET.POPULATION", "per_level"),
    "GN": ("MODEL.RETINANET.NORM", "GN", "MODEL.FPN.NORM", "GN", *tiny.NO_LEVELS),
    "FrozenBN": ("MODEL.RETINANET.NORM", "", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.WEIGHTS", "detectron2://R.pkl"),
}


@pytest.fixture
def said(bnext_log, monkeypatch):
    """Lines of the doctor, which has said nothing in this process yet."""
    monkeypatch.setattr(notices, "_told_names", set())
    bnext_log.set_level(logging.DEBUG, "bnext")
    return lambda: [r.getMessage() for r in bnext_log.records if r.name == build_warnings.__name__]


def build(folder, *opts):
    with torch.device("meta"):
        return build_model(tiny.load(folder, "MODEL.DEVICE", "meta", *ENOUGH, *opts))


def test_row_3_is_said_once_with_the_key_that_mends_it(said, tmp_path):
    for _ in range(2):
        build(tmp_path, *ROW_3)

    (line,) = set(said())
    assert line.startswith("BN001: ")
    assert "MODEL.BNEXT.RETINANET.STATISTICS shared" in line
    assert "SOLVER.BNEXT.DOCTOR.WARN" in line

    build(tmp_path, *ROW_3, "MODEL.BNEXT.RETINANET.STATISTICS", "shared")
    assert len(set(said())) == 1, "whoever follows it hears no more"


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_left_alone(said, tmp_path, name):
    build(tmp_path, *HEALTHY[name])

    assert said() == []


def test_it_can_be_switched_off_and_is_silent_for_who_repairs_and_on_other_workers(said, tmp_path, monkeypatch):
    build(tmp_path, *ROW_3, "SOLVER.BNEXT.DOCTOR.WARN", False)
    with building_unwarned():
        build(tmp_path, *ROW_3)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    build(tmp_path, *ROW_3)

    assert said() == []


def test_a_doctor_that_fails_prevents_no_model(said, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(build_warnings, "collect_facts", fail)
    assert build(tmp_path, *ROW_3) is not None
    assert set(said()) == {"The doctor failed."}


def test_the_model_of_a_lazy_config_is_examined_too(said, tmp_path):
    with torch.device("meta"):
        opts = ("train.device=meta", "norms.RETINANET.POPULATION=shared", "norms.RETINANET.STATISTICS=per_level")
        opts += ("dataloader.train.total_batch_size=16",)
        build_model(tiny.load(tmp_path, *opts, config=tiny.LAZY))

    assert [line[:5] for line in set(said())] == ["BN001"]


def test_norms_that_detectron2_decays_alone_are_mended_by_its_key(said, tmp_path):
    """As a training warns of models that are not bnext's."""
    opts = ("MODEL.META_ARCHITECTURE", "RetinaNet", *tiny.NO_LEVELS)
    cfg = tiny.load(tmp_path, "MODEL.DEVICE", "meta", *ENOUGH, *opts)
    with torch.device("meta"):
        warn_of_faults(cfg, build_model(cfg))

    (line,) = (line for line in set(said()) if line.startswith("BN027"))
    assert "MODEL.META_ARCHITECTURE BNextRetinaNet" in line
    build(tmp_path, *opts, "MODEL.META_ARCHITECTURE", "BNextRetinaNet")
    assert len([line for line in set(said()) if line.startswith("BN027")]) == 1

"""Weights & Biases: refused in one line where it is not installed; what it would be given, in which order.

The service itself, and the package, are not tried here.
"""

import importlib.util
import math

import pytest
from detectron2.utils.events import EventStorage

from bnext.cli.train import check_run
from bnext.engine import Trainer
from bnext.engine.wandb_writer import ScalarWriter, build_wandb_writers
from bnext.errors import ConfigError
from tests import tiny

ON = ("SOLVER.BNEXT.WANDB.ENABLED", True)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("has_folder", [False, True])
def test_without_the_package_a_training_is_refused_before_it_starts(digits, tmp_path, monkeypatch, has_folder):
    if has_folder:  # of earlier runs
        (tmp_path / "wandb").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    cfg = tiny.load(tmp_path, *ON)
    for refuse in (check_run, Trainer, lambda cfg: build_wandb_writers(cfg, 0)):
        with pytest.raises(ConfigError, match="pip install wandb") as error:
            refuse(cfg)
        assert "\n" not in str(error.value)


def test_without_the_key_there_is_no_writer(digits, tmp_path):
    assert build_wandb_writers(tiny.load(tmp_path), 0) == []


def test_scalars_come_once_by_iteration_in_their_order():
    given, closed = [], []
    writer = ScalarWriter(lambda scalars, iteration: given.append((iteration, scalars)), lambda: closed.append(True))
    with EventStorage(0) as storage:
        for iteration in range(3):
            storage.iter = iteration
            storage.put_scalar("loss", float(iteration))
            if iteration == 1:
                storage.put_scalars(AP=50.0, APs=math.nan, smoothing_hint=False)
        writer.write()
        writer.write()
        storage.iter = 3
        storage.put_scalar("loss", 9.0)
        writer.write()
    writer.close()
    assert given == [(1, {"AP": 50.0}), (2, {"loss": 1.0}), (3, {"loss": 1.5})]
    assert closed == [True]

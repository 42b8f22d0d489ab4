"""Re-estimation in a training and of a checkpoint, on real images."""

from pathlib import Path

import pytest
import torch

from bnext.engine import train
from bnext.engine.recompute import repair_checkpoint
from bnext.errors import CheckpointError
from bnext.layers import TABLE5_ROWS
from tests.engine import tiny

KEYS = ("STATISTICS", "POPULATION", "AFFINE")


def row_opts(row):
    pairs = zip(KEYS, TABLE5_ROWS[row], strict=True)
    return [item for key, value in pairs for item in (f"MODEL.BNEXT.RETINANET.{key}", value)]


@pytest.mark.parametrize("row", [1, 3, 6])
def test_precise_bn_in_a_training_writes_what_is_evaluated(digits, tmp_path, row):
    """fvcore's estimate, which detectron2's hook uses, fails on every row."""
    opts = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "SOLVER.MAX_ITER", 2]
    train(tiny.load(tmp_path, *opts, *row_opts(row)))
    state = torch.load(Path(tmp_path, "model_final.pth"))["model"]
    counters = {key: int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert set(counters.values()) == {2}
    assert any(key.startswith("backbone") for key in counters)
    assert any(key.startswith("head") for key in counters)


def test_repair_changes_the_statistics_of_the_head_alone(finished, tmp_path):
    cfg, _ = finished
    weights = Path(cfg.OUTPUT_DIR, "model_final.pth")
    before = weights.read_bytes()
    repair_checkpoint(tiny.load(tmp_path, "TEST.PRECISE_BN.NUM_ITER", 2, *row_opts(6)), str(weights))
    assert weights.read_bytes() == before
    old, new = torch.load(weights)["model"], torch.load(tmp_path / "model_final.pth")["model"]
    same = [key for key in old if key in new and torch.equal(old[key], new[key])]
    assert set(same) >= {key for key in old if key.startswith("backbone")}
    assert {key for key in new if key not in same} == {
        f"head.{tower}.1.p{level}.{name}"
        for tower in ("cls_subnet", "bbox_subnet")
        for level in range(3, 8)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_repair_of_another_architecture_is_refused(digits, tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="every parameter"):
        repair_checkpoint(tiny.load(tmp_path / "out"), str(tmp_path / "other.pth"))

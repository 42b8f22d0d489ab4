"""What two gloo workers must do, in one spawn; run by test_launch.py in a process of its own.

python -m tests.engine.two_workers FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm
from torch import nn

from bnext.data.check_coco import check_datasets
from bnext.distributed.equal_buffers import equalize_buffers
from bnext.engine import Trainer, launch, train
from bnext.engine.launch import count_cores
from bnext.errors import DatasetError
from tests import tiny


def check_world():
    assert (comm.get_world_size(), comm.get_local_size()) == (2, 2)
    assert comm.get_local_rank() == comm.get_rank()
    assert torch.get_num_threads() == max(1, count_cores() // 2)
    assert comm.all_gather(comm.get_rank()) == [0, 1]


def check_equal_buffers():
    """Merged as parts of one population, against the definition; a frozen or equal layer is left alone.

    facebookresearch/detectron2#1297, open-mmlab/mmdetection#2539: elsewhere every worker evaluates with its own.
    """
    rank = comm.get_rank()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2))
    means = torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, -5.0]])
    variances = torch.tensor([[1.0, 4.0, 0.5], [3.0, 4.0, 0.25]])
    model[0].running_mean.copy_(means[rank])
    model[0].running_var.copy_(variances[rank])
    model[1].running_var.fill_(1 / 3)
    spread = equalize_buffers(model)
    assert torch.equal(model[0].running_mean, means.mean(0))
    assert torch.equal(model[0].running_var, variances.mean(0) + means.var(0, correction=0))
    assert torch.equal(model[1].running_var, torch.full((2,), 1 / 3))
    assert spread == {"0.running_mean": 10.0, "0.running_var": 2.0}


def check_resume(folder):
    """Bit by bit, with a normalizer of each worker's own, and a head that shares its mini-batch over both."""
    whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
    sync = ("MODEL.RETINANET.NORM", "SyncBN", "MODEL.BNEXT.RETINANET.STATISTICS", "shared")
    train(tiny.load(whole, *sync))
    cfg = tiny.load(resumed, *sync)
    tiny.train_until(cfg, 4)
    results = train(cfg, resume=True)
    comm.synchronize()
    first, second = (torch.load(path / "model_final.pth") for path in (whole, resumed))
    assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])
    normalizers = [worker[""] for worker in first["trainer"]["bnext"]["workers"]]
    assert len(set(normalizers)) == 2, "each worker has an average of its own"
    last = [[line for line in tiny.read_metrics(path) if line["iteration"] == 5] for path in (whole, resumed)]
    assert last[0] == last[1] != []
    assert bool(results) == comm.is_main_process()


def check_saved_is_evaluated(folder):
    """Each worker evaluates with the buffers that worker 0 saved, in the middle and at the end."""
    opts = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
    evaluated = []

    class Watcher(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            evaluated.append({key: value.clone() for key, value in model.state_dict().items()})
            return {}

    Watcher(tiny.load(folder, *opts)).train()
    comm.synchronize()
    saved = [torch.load(Path(folder, f"{name}.pth"))["model"] for name in ("model_0000001", "model_final")]
    assert len(evaluated) == 2
    for ours, theirs in zip(evaluated, saved, strict=True):
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def check_freezing(folder):
    """From iteration 2 on statistics and affines are bitwise constant and equal, and everything else trains."""
    opts = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.BNEXT.FREEZE.ITER", 2)
    cfg = tiny.load(folder, *opts, "SOLVER.WEIGHT_DECAY_NORM", 0.01)
    states = []
    trainer = Trainer(cfg)
    keep = CallbackHook(after_step=lambda t: states.append({k: v.clone() for k, v in t.model.state_dict().items()}))
    trainer.register_hooks([keep])
    trainer.train()
    norms = {key for key in states[0] if ".norm." in key or "_subnet.1." in key}
    assert {key for key in norms if not torch.equal(states[1][key], states[5][key])} == set()
    before = {key for key in norms if "num_batches" not in key and not torch.equal(states[0][key], states[1][key])}
    assert len(before) > len(norms) / 2, "until then they train"
    trained = {key.removeprefix("module.") for key, value in trainer.model.named_parameters() if value.requires_grad}
    own = {key for key in states[0] if key.removeprefix("module.") in trained and key not in norms}
    assert {key for key in own if torch.equal(states[1][key], states[5][key])} == set()
    assert all(equal for equal in compare_with_worker_0(states[5]).values())


def compare_with_worker_0(state):
    every = comm.all_gather(state)
    return {key: torch.equal(value, every[0][key]) for key, value in state.items()}


def work(folder):
    tiny.register(Path(folder, "datasets"))
    check_datasets(["digits_train"], num_classes=10)
    check_world()
    check_equal_buffers()
    check_saved_is_evaluated(Path(folder, "saved"))
    check_freezing(Path(folder, "frozen"))
    check_resume(folder)
    Path(folder, f"worker{comm.get_rank()}.passed").touch()


def fail():
    if comm.get_rank() == 1:
        raise DatasetError("worker 1 failed on purpose")
    comm.synchronize()  # never answered


def look(folder):
    check_world()
    Path(folder, f"torchrun{comm.get_rank()}.passed").touch()


if __name__ == "__main__":
    where = sys.argv[1]
    if "RANK" in os.environ:
        launch(look, 1, args=(where,))
        assert not torch.distributed.is_initialized()
    else:
        launch(work, 2, args=(where,))
        launch(fail, 2)  # last, as it raises

"""What two gloo workers do about population statistics in a training; run by test_smart_batch_norm.py.

python -m tests.engine.two_workers_population FOLDER
"""

import copy
import sys
from pathlib import Path

import torch
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import build_model
from detectron2.utils import comm

from bnext.data.batches import build_validation_batches
from bnext.distributed.equal_buffers import equalize_buffers, norm_buffers
from bnext.engine import Trainer, launch
from bnext.errors import StatisticsError
from bnext.evaluation.validation_loss import compute_validation_loss
from tests import tiny

SHORT = ("SOLVER.STEPS", "()", "SOLVER.MAX_ITER", 4)
PRECISE = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1)
SMART = ("TEST.BNEXT.SMART_BATCH_NORM", True)
SYNC = ("MODEL.RETINANET.NORM", "SyncBN", "MODEL.BNEXT.RETINANET.STATISTICS", "shared")


class Watcher(Trainer):
    """Keeps with what is evaluated: buffers, and what normalizes."""

    def __init__(self, cfg):
        self.evaluated = []
        super().__init__(cfg)

    def test(self, cfg, model, evaluators=None):
        norms = [module for module in model.modules() if hasattr(module, "spec")]
        inference = {norm.spec.inference for norm in norms}
        self.evaluated.append((inference, {name: value.clone() for name, value in model.state_dict().items()}))
        return {}


def are_equal_on_workers(state):
    return all(torch.equal(value, own[name]) for own in comm.all_gather(state) for name, value in state.items())


def differ(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def record_steps(cfg):
    trainer, steps = Trainer(cfg), []
    keep = CallbackHook(before_step=lambda t: steps.append({k: v.clone() for k, v in t.model.state_dict().items()}))
    trainer.register_hooks([keep])
    trainer.train()
    comm.synchronize()
    return steps


def check_estimates(folder):
    """Equal on the workers, saved is evaluated; the steps of each worker are bitwise those without estimates."""
    cfg = tiny.load(folder / "watched", *SHORT, *PRECISE, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
    trainer = Watcher(cfg)
    trainer.train()
    comm.synchronize()
    saved = [torch.load(folder / "watched" / f"{name}.pth")["model"] for name in ("model_0000001", "model_final")]
    assert len(trainer.evaluated) == 2
    for (inference, evaluated), file in zip(trainer.evaluated, saved, strict=True):
        assert inference == {"population"}
        assert differ(evaluated, file) == []
        assert are_equal_on_workers(dict(evaluated))
    opts = (*SHORT, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
    with_them, without = (record_steps(tiny.load(folder / n, *opts, *o)) for n, o in (("on", PRECISE), ("off", ())))
    assert [differ(first, second) for first, second in zip(with_them, without, strict=True)] == [[]] * 4
    assert not are_equal_on_workers(with_them[3]), "each worker has averages of its own between checkpoints"


def check_smart(folder):
    """By mini-batches until the end; the one estimate is of an epoch over both workers, saved and evaluated."""
    cfg = tiny.load(folder / "smart", *SHORT, *SMART, *SYNC, "TEST.EVAL_PERIOD", 2)
    trainer = Watcher(cfg)
    trainer.train()
    comm.synchronize()
    assert [inference for inference, _ in trainer.evaluated] == [{"mini_batch"}, {"population"}]
    file = torch.load(folder / "smart" / "model_final.pth")["model"]
    _, evaluated = trainer.evaluated[-1]
    assert differ(evaluated, file) == []
    assert are_equal_on_workers(dict(evaluated))
    counters = {int(value) for name, value in file.items() if name.endswith("num_batches_tracked")}
    assert counters == {6}, "12 images, 2 on each worker per batch"


def check_validation_loss(folder):
    """Equal on the workers, of all images once, with merged statistics, whatever share each worker has."""
    cfg = tiny.load(folder / "loss", *SYNC, "SOLVER.IMS_PER_BATCH", 2)
    torch.manual_seed(0)
    model, rank = build_model(cfg), comm.get_rank()
    for _, buffer in norm_buffers(model):
        buffer.add_(rank)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    every = comm.all_gather(list(build_validation_batches(cfg, "digits_val")))
    all_batches = [batch for own in every for batch in own]
    assert len({batch[0]["file_name"] for batch in all_batches}) == 4
    own = all_batches[:3] if rank == 0 else all_batches[3:]
    merged = copy.deepcopy(model)
    equalize_buffers(merged)
    for statistics in ("population", "mini_batch"):
        losses = compute_validation_loss(model, own, statistics=statistics)
        assert len(set(comm.all_gather(tuple(losses.values())))) == 1
        if statistics == "population":  # every image twice: the same mean
            expected = compute_validation_loss(merged, all_batches)
            assert abs(losses["total_loss"] - expected["total_loss"]) < 1e-5 * expected["total_loss"]
        assert differ(dict(model.named_buffers()), before) == []
    try:
        compute_validation_loss(model, own if rank == 0 else [])
    except StatisticsError as error:
        assert "got none on worker 1" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a worker without images must be told")
    Watcher(tiny.load(folder / "trained", *SHORT, *SYNC, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 3)).train()
    comm.synchronize()
    lines = tiny.read_metrics(folder / "trained")
    assert any("validation_loss/total_loss" in line for line in lines)


def work(folder):
    folder = Path(folder)
    tiny.register(folder / "datasets")
    for check in (check_validation_loss, check_smart, check_estimates):
        check(folder)
    (folder / f"worker{comm.get_rank()}.passed").touch()


if __name__ == "__main__":
    launch(work, 2, args=(sys.argv[1],))

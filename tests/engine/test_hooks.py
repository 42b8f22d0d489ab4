"""Hooks: their order, their seeds, the memory of the metrics."""

import random

import numpy as np
import pytest
import torch
from detectron2.engine import hooks as d2_hooks
from detectron2.utils.events import EventStorage
from torch import nn

from bnext.engine import Trainer, hooks
from bnext.engine.population import PreciseBN
from bnext.engine.validation_hook import ValidationLoss
from tests import tiny
from tests.engine.quadratic import make_trainer


@pytest.mark.parametrize("key", ["TEST.PRECISE_BN.ENABLED", "TEST.BNEXT.SMART_BATCH_NORM"])
def test_saved_is_evaluated_because_of_the_order(digits, tmp_path, key):
    cfg = tiny.load(tmp_path, key, True, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 2)
    kinds = [type(hook) for hook in Trainer(cfg)._hooks]
    order = [
        d2_hooks.LRScheduler,
        PreciseBN,
        hooks.EqualizeBuffers,
        hooks.PeriodicCheckpointer,
        ValidationLoss,
        hooks.EvalHook,
        hooks.PeriodicWriter,
    ]
    assert [kind for kind in kinds if kind in order] == order


@pytest.mark.parametrize(
    ("iteration", "period", "due"), [(1, 2, True), (2, 2, False), (2, 0, False), (9, 0, True), (9, 4, True)]
)
def test_due_is_every_period_and_the_end(iteration, period, due):
    assert hooks.is_due(iteration, period, 10) is due


def draws_of_steps(start):
    draws = {}

    def draw(trainer):
        draws[trainer.iter] = (torch.rand(()).item(), np.random.rand(), random.random())  # noqa: NPY002

    make_trainer(hooks.SeedSteps(), d2_hooks.CallbackHook(after_step=draw)).train(start, 6)
    return draws


def test_random_numbers_of_a_step_do_not_depend_on_the_start():
    whole = draws_of_steps(0)
    torch.rand(7)
    assert draws_of_steps(4) == {4: whole[4], 5: whole[5]}
    assert len(set(whole.values())) == 6


def test_smoothed_metrics_go_on_where_they_were():
    first = make_trainer(hooks.RememberMetrics())
    with EventStorage(0) as first.storage:
        for first.storage.iter in range(30):
            first.storage.put_scalars(total_loss=first.storage.iter, time=1.0)
            first.storage.put_scalar("lr", 0.1, smoothing_hint=False)
        state = first._hooks[0].state_dict()
    assert state == {"total_loss": [(float(value), value) for value in range(10, 30)]}
    second = make_trainer(hooks.RememberMetrics())
    second.start_iter = 30
    second._hooks[0].load_state_dict(state)
    with EventStorage(30) as second.storage:
        second.before_train()
        assert second.storage.iter == 30
        assert second.storage.history("total_loss").median(20) == first.storage.history("total_loss").median(20)


def test_no_evaluation_follows_a_failure_in_the_last_iteration():
    called = []

    def fail(trainer):
        if trainer.iter == 3:
            raise RuntimeError("on purpose")

    trainer = make_trainer(hooks.EvalHook(0, lambda: called.append(1)), d2_hooks.CallbackHook(before_step=fail))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train(0, 4)
    assert called == []
    make_trainer(hooks.EvalHook(0, lambda: called.append(1))).train(0, 4)
    assert called == [1]


class Saved:
    """Stands for the checkpointer: what is saved when."""

    path_manager = None

    def __init__(self):
        self.names = []

    def save(self, name, **kwargs):
        self.names.append((name, kwargs["iteration"]))


@pytest.mark.parametrize("period", [0, -1])
def test_without_a_period_only_the_end_is_saved(period):
    saved = Saved()
    trainer = make_trainer(hooks.PeriodicCheckpointer(saved, period))
    gathered = []
    trainer.gather_worker_states = lambda: gathered.append(trainer.iter)
    trainer.train(0, 4)
    assert saved.names == [("model_final", 3)]
    assert gathered == [3]


def test_buffers_of_one_worker_are_left_alone():
    model = nn.BatchNorm2d(3)
    model.running_var.fill_(1 / 3)
    assert hooks.equalize_buffers(model) == {}
    assert bool((model.running_var == 1 / 3).all())

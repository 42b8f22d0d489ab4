"""Hooks: their order, their seeds, the progress bar, the memory of the metrics."""

import io
import logging
import os
import random
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine import hooks as d2_hooks
from detectron2.utils.events import EventStorage
from torch import nn

from bnext.engine import Trainer, hooks
from bnext.engine.precise_bn import PreciseBN
from bnext.engine.smart_batch_norm import SmartBatchNorm
from bnext.engine.validation_hook import ValidationLoss
from tests import tiny


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, data):
        return {"loss": (self.weight - data) ** 2}


def make_trainer(*registered):
    model = Quadratic()
    data = [torch.tensor(float(value)) for value in range(100)]
    trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), 0.01))
    trainer.seed = 5
    trainer.register_hooks(list(registered))
    return trainer


@pytest.mark.parametrize(
    ("key", "estimates"), [("TEST.PRECISE_BN.ENABLED", PreciseBN), ("TEST.BNEXT.SMART_BATCH_NORM", SmartBatchNorm)]
)
def test_saved_is_evaluated_because_of_the_order(digits, tmp_path, key, estimates):
    cfg = tiny.load(tmp_path, key, True, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 2)
    kinds = [type(hook) for hook in Trainer(cfg)._hooks]
    order = [
        d2_hooks.LRScheduler,
        estimates,
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
    found = {}

    def draw(trainer):
        found[trainer.iter] = (torch.rand(()).item(), np.random.rand(), random.random())  # noqa: NPY002

    make_trainer(hooks.SeedSteps(), d2_hooks.CallbackHook(after_step=draw)).train(start, 6)
    return found


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


@contextmanager
def console(monkeypatch):
    """The console and log.txt on detectron2's logger, both StreamHandlers, as its setup_logger makes them."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    logger = logging.getLogger("detectron2")
    handlers = [logging.StreamHandler(sys.stdout), logging.StreamHandler(io.StringIO())]
    before = logger.level, list(logger.handlers)
    logger.handlers = list(handlers)
    logger.setLevel(logging.INFO)
    yield handlers
    logger.setLevel(before[0])
    logger.handlers = before[1]


def test_the_bar_shows_progress_loss_and_rate_and_keeps_the_console_clean(monkeypatch):
    stream = io.StringIO()

    def log(trainer):
        trainer.storage.put_scalar("lr", 0.25, smoothing_hint=False)
        logging.getLogger("detectron2.utils.events").info("metrics")

    with console(monkeypatch) as (terminal, file):
        before = list(logging.getLogger("detectron2").handlers)
        make_trainer(d2_hooks.CallbackHook(after_step=log), hooks.ProgressBar(stream)).train(0, 4)
        assert logging.getLogger("detectron2").handlers == before
    assert "4/4" in stream.getvalue()
    assert "loss=" in stream.getvalue()
    assert "lr=0.25" in stream.getvalue()
    assert "metrics" not in terminal.stream.getvalue()
    assert "Starting training" in terminal.stream.getvalue()
    assert file.stream.getvalue().count("metrics") == 4
    assert terminal.filters == []


def test_lines_come_above_the_bar_while_stdout_is_redirected(monkeypatch):
    both = io.StringIO()  # a terminal: the bar and the console write to it
    monkeypatch.setattr(sys, "__stdout__", both)

    def log(trainer):
        logging.getLogger("detectron2.utils.events").info("metrics")
        logging.getLogger("detectron2.data").warning("a warning")

    with console(monkeypatch) as (terminal, _):
        terminal.setStream(both)
        make_trainer(d2_hooks.CallbackHook(after_step=log), hooks.ProgressBar(both)).train(0, 3)
        assert terminal.stream is both
    text = both.getvalue()
    assert "metrics" not in text
    lines = text.replace("\r", "\n").splitlines()
    assert lines.count("a warning") == 3
    assert text.endswith("\n")


def test_the_bar_is_closed_when_the_training_fails(monkeypatch):
    def fail(trainer):
        raise RuntimeError("on purpose")

    trainer = make_trainer(hooks.ProgressBar(io.StringIO()), d2_hooks.CallbackHook(before_step=fail))
    with console(monkeypatch) as (terminal, _):
        before = list(logging.getLogger("detectron2").handlers)
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.train(0, 4)
        assert logging.getLogger("detectron2").handlers == before
    assert terminal.filters == []


def test_a_bar_is_for_terminals():
    assert not hooks.ProgressBar.is_wanted(io.StringIO())
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal:
        assert hooks.ProgressBar.is_wanted(terminal)


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

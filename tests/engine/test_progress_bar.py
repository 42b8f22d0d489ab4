"""The progress bar: what it shows, and that the console stays clean."""

import io
import logging
import os
import sys
from contextlib import contextmanager

import pytest
from detectron2.engine import hooks as d2_hooks

from bnext.engine.progress_bar import ProgressBar
from tests.engine.quadratic import make_trainer


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
        make_trainer(d2_hooks.CallbackHook(after_step=log), ProgressBar(stream)).train(0, 4)
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
        make_trainer(d2_hooks.CallbackHook(after_step=log), ProgressBar(both)).train(0, 3)
        assert terminal.stream is both
    text = both.getvalue()
    assert "metrics" not in text
    lines = text.replace("\r", "\n").splitlines()
    assert lines.count("a warning") == 3
    assert text.endswith("\n")


def test_the_bar_is_closed_when_the_training_fails(monkeypatch):
    def fail(trainer):
        raise RuntimeError("on purpose")

    trainer = make_trainer(ProgressBar(io.StringIO()), d2_hooks.CallbackHook(before_step=fail))
    with console(monkeypatch) as (terminal, _):
        before = list(logging.getLogger("detectron2").handlers)
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.train(0, 4)
        assert logging.getLogger("detectron2").handlers == before
    assert terminal.filters == []


def test_a_bar_is_for_terminals():
    assert not ProgressBar.is_wanted(io.StringIO())
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal:
        assert ProgressBar.is_wanted(terminal)

"""A training's progress bar for people at a terminal, with the log's lines above it."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import TextIO

from detectron2.engine import HookBase

from bnext.engine.screen import is_console
from bnext.progress import AboveBars, is_terminal, showing_progress

__all__ = ["ProgressBar"]

_CONSOLE_LOGGERS = ("detectron2", "fvcore", "bnext")


class ProgressBar(HookBase):
    """A bar with the remaining time, the loss and the learning rate, for people at a terminal.

    Log lines are written above the bar; the periodic lines of metrics go to log.txt alone.

    Args:
        stream: where to draw; the standard error stream by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._stack = ExitStack()

    @staticmethod
    def is_wanted(stream: TextIO | None = None) -> bool:
        """Whether a stream (the standard error stream by default) is a terminal."""
        return is_terminal(stream or sys.stderr)

    def before_train(self) -> None:
        trainer = self.trainer
        bar = showing_progress(
            "training", trainer.max_iter, stream=self._stream, initial=trainer.start_iter, leave=True, delay=0
        )
        self._bar = self._stack.enter_context(bar)

        handlers: set[logging.Handler] = set()  # the loggers share some
        for name in _CONSOLE_LOGGERS:
            handlers.update(logging.getLogger(name).handlers)

        for handler in handlers:
            if not isinstance(handler, logging.StreamHandler) or not is_console(handler):
                continue
            handler.addFilter(_is_not_metrics)
            self._stack.callback(handler.removeFilter, _is_not_metrics)
            if not isinstance(handler.stream, AboveBars):
                self._stack.callback(handler.setStream, handler.stream)
                handler.setStream(AboveBars(handler.stream))

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        shown = {}
        for name, metric in (("loss", "total_loss"), ("lr", "lr")):
            if metric in latest:
                shown[name] = f"{latest[metric][0]:.4g}"

        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._stack.close()

    def after_train(self) -> None:
        self._stack.close()


def _is_not_metrics(record: logging.LogRecord) -> bool:
    return not record.name.endswith(".utils.events")

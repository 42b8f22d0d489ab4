"""A progress bar for people at a terminal, with the log's lines above it."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import TextIO

from detectron2.engine import HookBase
from tqdm import tqdm

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
        stream = stream or sys.stderr
        return stream is not None and stream.isatty()

    def before_train(self) -> None:
        trainer = self.trainer

        self._bar = self._stack.enter_context(
            tqdm(
                total=trainer.max_iter,
                initial=trainer.start_iter,
                desc="training",
                unit="it",
                file=self._stream,
                dynamic_ncols=True,
            )
        )
        handlers: set[logging.Handler] = set()  # the loggers share some
        for name in _CONSOLE_LOGGERS:
            handlers.update(logging.getLogger(name).handlers)

        for handler in handlers:
            if isinstance(handler, logging.StreamHandler) and _is_console(handler.stream):
                handler.addFilter(_is_not_metrics)
                self._stack.callback(handler.removeFilter, _is_not_metrics)
                self._stack.callback(handler.setStream, handler.stream)
                handler.setStream(_AboveBar(handler.stream, self._bar))

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


def _is_console(stream: TextIO | None) -> bool:
    # log.txt is a StreamHandler of Detectron2's too, so the stream decides. sys.stdout may be redirected for now.
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


class _AboveBar:
    """A stream whose lines come above a bar. tqdm's own redirection knows the present sys.stdout only."""

    def __init__(self, stream: TextIO, bar: tqdm) -> None:
        self._stream = stream
        self._bar = bar

    def write(self, text: str) -> None:
        with self._bar.get_lock():
            self._bar.clear(nolock=True)
            self._stream.write(text)
            self._stream.flush()
            self._bar.refresh(nolock=True)

    def flush(self) -> None:
        self._stream.flush()


def _is_not_metrics(record: logging.LogRecord) -> bool:
    return record.name != "detectron2.utils.events"

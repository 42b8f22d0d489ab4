"""What happens around a training step: seeds, equal norm buffers, checkpoints, evaluation, the progress bar.

Order matters and is fixed in `Trainer.build_hooks`: population statistics are re-estimated
(`bnext.engine.precise_bn`), buffers are made equal on all workers, the checkpoint is written, and
then it is evaluated, so that what is saved is what was evaluated.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TextIO

from detectron2.engine import HookBase
from detectron2.engine import hooks as d2_hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from tqdm import tqdm

from bnext.distributed.equal_buffers import equalize_buffers
from bnext.seeding import derive_seed, seed_everything

__all__ = [
    "EqualizeBuffers",
    "EvalHook",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "ProgressBar",
    "RememberMetrics",
    "SeedSteps",
    "is_due",
]

_STEP = 4  # what the derived seed is for
_CONSOLE_LOGGERS = ("detectron2", "fvcore", "bnext")


def is_due(iteration: int, period: int, max_iter: int) -> bool:
    """Whether something that runs every `period` iterations and after the last one runs now.

    Args:
        iteration: the one just done, from 0.
        period: 0 or less: after the last iteration only.
        max_iter: number of iterations.
    """
    return (period > 0 and (iteration + 1) % period == 0) or iteration + 1 >= max_iter


class SeedSteps(HookBase):
    """Make what a step draws at random (RoI sampling, dropout) depend on seed, iteration and worker only."""

    def before_step(self) -> None:
        seed_everything(derive_seed(self.trainer.seed, _STEP, self.trainer.iter, comm.get_rank()))


class EqualizeBuffers(HookBase):
    """Make norm buffers equal on all workers before a checkpoint or an evaluation.

    Detectron2's DDP does not exchange buffers; without this each worker would evaluate its share of
    the images with its own statistics, and worker 0's would be saved.

    Args:
        periods: of what follows in the list of hooks (checkpoints, evaluation).
    """

    def __init__(self, *periods: int) -> None:
        self._periods = periods
        self._has_told = False

    def after_step(self) -> None:
        if not any(is_due(self.trainer.iter, period, self.trainer.max_iter) for period in self._periods):
            return
        spread = equalize_buffers(self.trainer.model)
        if spread and not self._has_told:
            self._has_told = True
            name, value = max(spread.items(), key=lambda item: item[1])
            logging.getLogger(__name__).info(
                "Norm buffers of the %d workers were made equal before saving and evaluating: %d differed, by up to "
                "%.3g (%s). This is normal with a BN per worker; further differences are not reported.",
                comm.get_world_size(),
                len(spread),
                value,
                name,
            )


class PeriodicCheckpointer(d2_hooks.PeriodicCheckpointer):
    """Detectron2's, on every worker: what differs between workers is gathered before worker 0 writes.

    A period of 0 or less: after the last iteration only (`is_due`), where Detectron2 divides by it.
    """

    def before_train(self) -> None:
        super().before_train()
        if self.period <= 0:
            self.period = self.trainer.max_iter + 1  # never reached: the last iteration has a file of its own

    def after_step(self) -> None:
        if is_due(self.trainer.iter, self.period, self.trainer.max_iter):
            self.trainer.gather_worker_states()
        super().after_step()


class EvalHook(d2_hooks.EvalHook):
    """Detectron2's, but without an evaluation when the training failed in its last iteration."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class PeriodicWriter(d2_hooks.PeriodicWriter):
    """Detectron2's, but files are opened when a training starts, not when a trainer is made.

    Args:
        build: makes the writers.
        period: iterations between writes.
    """

    def __init__(self, build: Callable[[], list[EventWriter]], period: int = 20) -> None:
        super().__init__([], period)
        self._build = build

    def before_train(self) -> None:
        self._writers = self._build()


class RememberMetrics(HookBase):
    """Keep the last values of the smoothed metrics in the checkpoint.

    metrics.json holds medians over 20 iterations; after a resume they would otherwise be taken over
    fewer. Times are not kept, they belong to one run.
    """

    window = 20

    def __init__(self) -> None:
        self._loaded: dict[str, list[tuple[float, int]]] = {}

    def state_dict(self) -> dict[str, list[tuple[float, int]]]:
        storage = self.trainer.storage
        smoothed = [name for name, hint in storage.smoothing_hints().items() if hint and not name.endswith("time")]
        histories = storage.histories()
        return {
            name: [(float(value), int(at)) for value, at in histories[name].values()[-self.window :]]
            for name in smoothed
        }

    def load_state_dict(self, state: dict[str, list[tuple[float, int]]]) -> None:
        self._loaded = state

    def before_train(self) -> None:
        storage = self.trainer.storage
        for name, values in self._loaded.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value)
        storage.iter = self.trainer.start_iter


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
        handlers = {handler for log in _CONSOLE_LOGGERS for handler in logging.getLogger(log).handlers}
        for handler in filter(_writes_to_console, handlers):
            handler.addFilter(_is_not_metrics)
            self._stack.callback(handler.removeFilter, _is_not_metrics)
            self._stack.callback(handler.setStream, handler.stream)
            handler.setStream(_AboveBar(handler.stream, self._bar))

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        shown = {"loss": latest.get("total_loss"), "lr": latest.get("lr")}
        values = {name: f"{value[0]:.4g}" for name, value in shown.items() if value is not None}
        self._bar.set_postfix(values, refresh=False)
        self._bar.update()
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._stack.close()

    def after_train(self) -> None:
        self._stack.close()


def _writes_to_console(handler: logging.Handler) -> bool:
    # log.txt is a StreamHandler of Detectron2's too, so the stream decides. sys.stdout may be redirected for now.
    if not isinstance(handler, logging.StreamHandler) or handler.stream is None:
        return False
    return handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


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

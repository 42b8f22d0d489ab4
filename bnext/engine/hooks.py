"""Hooks around a training step: its seeds, equal norm buffers, checkpoints, evaluation, metrics.

Order matters and is fixed in `Trainer.build_hooks`: population statistics are re-estimated
(`bnext.engine.population`), buffers are made equal on all workers, the checkpoint is written, and
then it is evaluated, so that what is saved is what was evaluated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from detectron2.engine import HookBase
from detectron2.engine import hooks as d2_hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from bnext.distributed.equal_buffers import equalize_buffers
from bnext.files import naming_file
from bnext.seeding import Purpose, derive_seed, seed_everything

__all__ = [
    "EqualizeBuffers",
    "EvalHook",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "RememberMetrics",
    "SeedSteps",
    "is_due",
]


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
        seed_everything(derive_seed(self.trainer.seed, Purpose.STEP, self.trainer.iter, comm.get_rank()))


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
        trainer = self.trainer
        if not any(is_due(trainer.iter, period, trainer.max_iter) for period in self._periods):
            return

        differences = equalize_buffers(trainer.model)
        if not differences or self._has_told:
            return

        name = max(differences, key=differences.__getitem__)
        logging.getLogger(__name__).info(
            "Norm buffers of the %d workers were made equal before saving and evaluating: %d differed, by up to "
            "%.3g (%s). This is normal with a BN per worker; further differences are not reported.",
            comm.get_world_size(),
            len(differences),
            differences[name],
            name,
        )
        self._has_told = True


class PeriodicCheckpointer(d2_hooks.PeriodicCheckpointer):
    """Detectron2's, on every worker: what differs between workers is gathered before worker 0 writes.

    A period of 0 or less: after the last iteration only (`is_due`), where Detectron2 divides by it.
    """

    period: int

    def before_train(self) -> None:
        super().before_train()
        if self.period <= 0:
            self.period = self.trainer.max_iter + 1  # never reached: the last iteration has a file of its own

    def after_step(self) -> None:
        self.max_iter = self.trainer.max_iter  # a training may end early
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

    def after_step(self) -> None:
        if is_due(self.trainer.iter, self._period, self.trainer.max_iter):
            for writer in self._writers:
                self._write(writer)

    def after_train(self) -> None:
        for writer in self._writers:
            self._write(writer)
            writer.close()

    def _write(self, writer: EventWriter) -> None:
        file = getattr(getattr(writer, "_file_handle", None), "name", None)
        with naming_file(file or os.path.join(self.trainer.cfg.OUTPUT_DIR, "events.*")):
            writer.write()


class RememberMetrics(HookBase):
    """Keep the last values of the smoothed metrics in the checkpoint.

    metrics.json holds medians over 20 iterations; after a resume they would otherwise be taken over
    fewer. Times are not kept, they belong to one run.
    """

    window = 20

    def __init__(self) -> None:
        self._loaded: dict[str, list[tuple[float, int]]] = {}

    def state_dict(self) -> dict[str, list[tuple[float, int]]]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # before the training
            return self._loaded

        state = {}
        for name, is_smoothed in storage.smoothing_hints().items():
            if is_smoothed and not name.endswith("time"):
                latest = storage.history(name).values()[-self.window :]
                state[name] = [(float(value), int(iteration)) for value, iteration in latest]
        return state

    def load_state_dict(self, state: dict[str, list[tuple[float, int]]]) -> None:
        self._loaded = state

    def before_train(self) -> None:
        storage = self.trainer.storage
        for name, values in self._loaded.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value)

        storage.iter = self.trainer.start_iter

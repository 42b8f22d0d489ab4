"""The doctor in a training: what norms do in its steps, and what is wrong with it, said while it can be mended."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine import hooks as d2_hooks
from detectron2.utils import comm
from torch import nn

from bnext.diagnostics.collecting.watch_training import TrainingWatch
from bnext.diagnostics.diagnose import Diagnosis, collect_facts, examine_facts
from bnext.diagnostics.facts import Facts, Origin, WeightsFacts
from bnext.diagnostics.findings import Finding
from bnext.diagnostics.reports.report_json import describe_diagnosis
from bnext.diagnostics.tell_findings import tell_findings
from bnext.distributed import unwrap_model
from bnext.engine.hooks import EqualizeBuffers, is_due
from bnext.engine.population import PreciseBN
from bnext.files import find_local_file, write_json
from bnext.heads.doctor_facts import add_config_facts

__all__ = ["DoctorHook", "Settle", "build_doctor"]

log = logging.getLogger(__name__)

FILE = "doctor.json"
_FIRST = 20  # steps after which there is a first look, early enough to begin anew


class DoctorHook(HookBase):
    """Watches the norms of a training, and warns of what the doctor finds: after 20 steps, on the way, and at its end.

    For any trainer with detectron2's hooks; register it last. What changes running statistics between two steps is a
    fault, unless it is detectron2's PreciseBN. The training is bitwise the one without it.

    Args:
        period: iterations between looks; 0: only after the first steps and at the end.
        cfg: of the training, with bnext's keys; OUTPUT_DIR/doctor.json takes the report, as `bnext doctor` writes it.
            None: what it says is not known, and there is no file.
        averaged: a model with averaged weights, see `bnext.diagnose`.

    Attributes:
        diagnosis: the last one; None: there was none yet.
        seconds: that this hook has taken.

    Note:
        No collective: it watches the worker on which it is, best the main one. The doctor ends no training: where it
        fails, that is logged at DEBUG, and it is gone.
    """

    def __init__(self, period: int = 1000, cfg: CfgNode | None = None, averaged: nn.Module | None = None) -> None:
        self.diagnosis: Diagnosis | None = None
        self.seconds = 0.0
        self.settle: Settle | None = None
        self._period = period
        self._cfg = cfg
        self._averaged = averaged
        self._watch: TrainingWatch | None = None
        self._optimizer: Any = None
        self._handle: Any = None
        self._told: dict[tuple[str, str], set[str]] = {}  # code and severity -> norms
        self._has_ended = False
        self._is_estimated = False

    def before_train(self) -> None:
        with self._guarded():
            trainer = self.trainer
            self._watch = TrainingWatch(trainer.model)
            self._optimizer = getattr(getattr(trainer, "_trainer", trainer), "optimizer", None)
            if hasattr(self._optimizer, "register_step_post_hook"):
                self._handle = self._optimizer.register_step_post_hook(self._end_step)

    def before_step(self) -> None:
        with self._guarded() as watch:
            if watch is None:
                return
            if self._was_written_on_purpose():
                watch.accept()

            watch.look()
            if self.settle is None:
                self.start_step()

    def start_step(self) -> None:
        """The beginning of the step, after which no other hook writes statistics."""
        if self._watch is not None:
            self._has_ended = False
            self._watch.start_step(self.trainer.iter)

    def after_step(self) -> None:
        if not self._has_ended:  # the optimizer tells nothing, or left out its step after an overflow
            self._end_step()

        with self._guarded() as watch:
            steps = self.trainer.iter + 1 - self.trainer.start_iter
            is_wanted = steps == _FIRST or is_due(self.trainer.iter, self._period, self.trainer.max_iter + 1)
            if watch is not None and is_wanted:
                self._examine(watch)

    def after_train(self) -> None:
        with self._guarded() as watch:
            if watch is not None:
                self._examine(watch)
        self._leave()

    def accept(self) -> None:
        """Take what hooks before `Settle` have written into statistics for on purpose."""
        with self._guarded() as watch:
            was_estimated, self._is_estimated = self._is_estimated, self._has_estimate()
            if watch is not None and (was_estimated or self._is_estimated or watch.has_seen_writes):
                watch.accept()

    def _has_estimate(self) -> bool:
        """Whether the statistics are those of bnext's PreciseBN, until the next step."""
        return any(isinstance(hook, PreciseBN) and hook.is_in_force for hook in self.trainer._hooks)

    def _end_step(self, *_: Any) -> None:
        with self._guarded() as watch:
            if watch is not None:
                self._has_ended = True
                watch.end_step()

    def _was_written_on_purpose(self) -> bool:
        """Whether detectron2's PreciseBN has just run."""
        hooks = [hook for hook in getattr(self.trainer, "_hooks", ()) if isinstance(hook, d2_hooks.PreciseBN)]
        return any(is_due(self.trainer.iter - 1, hook._period, self.trainer.max_iter + 1) for hook in hooks)

    def _examine(self, watch: TrainingWatch) -> None:
        self.diagnosis = examine_facts(self._collect(watch))
        tell_findings(log, self._choose_new(self.diagnosis.findings))
        for failure in self.diagnosis.failures:
            log.debug("%s", failure)
        if self._cfg is not None and find_local_file(self._cfg.OUTPUT_DIR) is not None:
            write_json(os.path.join(self._cfg.OUTPUT_DIR, FILE), describe_diagnosis(self.diagnosis))

    def _choose_new(self, findings: Sequence[Finding]) -> list[Finding]:
        """Findings on a norm of which the same was not yet said: a threshold is passed by others in every look."""
        kinds = [((finding.code, finding.severity), set(finding.evidence.layers)) for finding in findings]
        is_new = [kind not in self._told or not layers <= self._told[kind] for kind, layers in kinds]
        for kind, layers in kinds:
            self._told.setdefault(kind, set()).update(layers)
        return list(itertools.compress(findings, is_new))

    def _collect(self, watch: TrainingWatch) -> Facts:
        model, cfg = self.trainer.model, self._cfg
        facts = collect_facts(model, optimizer=self._optimizer, averaged=self._averaged, with_layers=False)
        facts = self._take_as_equalized(dataclasses.replace(facts, steps=watch.collect()))
        if cfg is None:
            return facts

        final = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
        is_over = self.trainer.iter >= self.trainer.max_iter and os.path.isfile(final)
        weights = WeightsFacts(final, is_loaded=True) if is_over else WeightsFacts()  # those of now are in no file
        origin = Origin("config", os.path.join(cfg.OUTPUT_DIR, "config.yaml"), weights=weights.source)
        facts = dataclasses.replace(facts, origin=origin, weights=weights)
        return add_config_facts(facts, cfg, unwrap_model(model))

    def _take_as_equalized(self, facts: Facts) -> Facts:
        """Facts without the switch of DistributedDataParallel whose work a hook of the trainer does."""
        training = facts.training
        is_done = any(isinstance(hook, EqualizeBuffers) for hook in getattr(self.trainer, "_hooks", ()))
        if not is_done or training is None or training.ddp is None:
            return facts
        ddp = {name: value for name, value in training.ddp.items() if name != "broadcast_buffers"}
        return dataclasses.replace(facts, training=dataclasses.replace(training, ddp=ddp))

    def _leave(self) -> None:
        """Take everything off the model and the optimizer."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
        if self._handle is not None:
            self._handle.remove()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[TrainingWatch | None]:
        """Its time is counted, and no error of it gets into the training."""
        start = time.perf_counter()
        try:
            yield self._watch
        except Exception:
            log.debug("The doctor failed.", exc_info=True)
            self._leave()
        finally:
            self.seconds += time.perf_counter() - start


class Settle(HookBase):
    """A second place in the order of hooks for a `DoctorHook`, after those that write running statistics on purpose.

    Args:
        doctor: a hook of the same trainer, before those.
    """

    def __init__(self, doctor: DoctorHook) -> None:
        self._doctor = doctor
        doctor.settle = self

    def before_step(self) -> None:
        self._doctor.accept()
        self._doctor.start_step()

    def after_step(self) -> None:
        self._doctor.accept()


def build_doctor(cfg: CfgNode) -> tuple[DoctorHook, Settle] | None:
    """The hooks of the doctor on the main worker, unless SOLVER.BNEXT.DOCTOR.PERIOD is 0."""
    period = cfg.SOLVER.BNEXT.DOCTOR.PERIOD
    if period == 0 or not comm.is_main_process():
        return None
    doctor = DoctorHook(period, cfg)
    return doctor, Settle(doctor)

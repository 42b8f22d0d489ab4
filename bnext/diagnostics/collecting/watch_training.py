"""A training as its batch norms see it: how often their statistics are updated, and what changes them between steps."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnext.diagnostics.diagnose import Diagnosis, collect_facts, examine_facts
from bnext.diagnostics.facts import StepFacts
from bnext.diagnostics.inventory import find_norm_records
from bnext.dispatch import is_compiled
from bnext.distributed import unwrap_model
from bnext.layers.norm_form import POPULATION
from bnext.scope.record import get_record

__all__ = ["TrainingWatch"]

_STEPS_WITH_CALLS = 2  # in which the calls of norms are counted; what a model calls does not change
_COUNTER = POPULATION[2]

_Values = dict[tuple[torch.device, torch.dtype], Tensor]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A holder of running statistics: a norm, or what a level or domain of it owns."""

    path: str
    buffers: dict[str, Tensor | None]

    def list_buffers(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of what has values."""
        named = [(name, self.buffers.get(name)) for name in POPULATION]
        return [(name, buffer) for name, buffer in named if type(buffer) is Tensor and not buffer.is_meta]

    @property
    def is_seen_by_value(self) -> bool:
        """Whether nothing counts its updates, nor torch's kernel its writes. On a GPU, looking would wait for it."""
        mean = self.buffers.get("running_mean")
        return mean is not None and self.buffers.get(_COUNTER) is None and mean.device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """Running statistics at one time: which tensors, how often torch has seen them written, and copies of all."""

    versions: list[tuple[int, int]]
    values: _Values

    @property
    def sizes(self) -> dict[tuple[torch.device, torch.dtype], int]:
        return {key: len(flat) for key, flat in self.values.items()}


class TrainingWatch:
    """Watches the running statistics of a model while it is trained; `diagnose` says what the doctor makes of it.

    The training is bitwise the one without it, and never waits for the device, unless something has written statistics
    between two steps.

    Args:
        model: in training, with or without DistributedDataParallel: the one that a step calls.

    Attributes:
        seconds: that it has taken itself.

    Note:
        Nothing is a collective: each worker watches itself. Of a compiled model neither forwards nor calls are counted.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> watch = TrainingWatch(model)
        >>> for batch in torch.randn(4, 2, 3, 5, 5):
        ...     with watch.step():  # around forward, backward and the step of the optimizer
        ...         _ = model(batch)
        >>> watch.collect().updates
        {'1': 4}
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seconds = 0.0
        self._num_steps = self._num_forwards = 0
        self._new_forwards = 0  # since the step began, or since its last end
        self._calls: Counter[str] = Counter()  # of norms, in this forward
        self._most_calls: dict[str, int] = {}
        self._changed_between: dict[str, int] = {}
        self._iteration = -1  # the last one that was done
        self._others_updates: Counter[int] = Counter()  # part -> those of no step

        inner = unwrap_model(model)
        records = [record for record in find_norm_records(inner) if record.statistics != "sample"]
        self._paths = [record.path for record in records]
        self._parts: list[_Part] = []
        for path in self._paths:
            for module in inner.get_submodule(path).modules():
                if "running_mean" in module._buffers:
                    self._parts.append(_Part(path, module._buffers))

        self._first = self._settled = self._snap()
        self._hooks, self._call_hooks = contextlib.ExitStack(), contextlib.ExitStack()
        if not any(is_compiled(module) for module in inner.modules()):
            self._add_hooks(inner)

    def _add_hooks(self, model: nn.Module) -> None:
        self._hooks.callback(model.register_forward_pre_hook(self._enter_forward).remove)
        self._hooks.callback(model.register_forward_hook(self._leave_forward, always_call=True).remove)
        for path in self._paths:
            norm = model.get_submodule(path)
            if not isinstance(norm, torch.jit.ScriptModule):
                self._call_hooks.callback(norm.register_forward_pre_hook(partial(self._see_call, path)).remove)

    def _enter_forward(self, model: nn.Module, args: Any) -> None:
        self._calls.clear()  # also of what activation checkpointing called in the backward
        self._new_forwards += model.training and not get_record().frozen  # of a forward beside the training

    def _leave_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        for path, number in self._calls.items():
            self._most_calls[path] = max(number, self._most_calls.get(path, 0))

    def _see_call(self, path: str, norm: nn.Module, args: Any) -> None:
        self._calls[path] += 1

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy, which a copied or saved model brings along in its hooks: it counts, and watches nothing."""
        return {"_calls": Counter(), "_most_calls": {}, "_new_forwards": 0}

    # ---- a loop

    @contextlib.contextmanager
    def step(self, iteration: int | None = None) -> Iterator[None]:
        """One step of the training: forward, backward and the step of the optimizer, nothing else.

        Args:
            iteration: its number, from 0; None: they are counted.
        """
        self.start_step(iteration)
        try:
            yield
        finally:
            self.end_step()

    def start_step(self, iteration: int | None = None) -> None:
        """The beginning of `step`, for loops that cannot write a `with`."""
        self.look()
        if self._num_steps == 0:
            self._first = self._settled = self._snap()
            self._others_updates.clear()
        elif self._num_steps == _STEPS_WITH_CALLS:
            self._call_hooks.close()

        self._num_steps += 1
        self._new_forwards = 0
        self._iteration = self._iteration + 1 if iteration is None else iteration

    def end_step(self) -> None:
        """The end of `step`. Of several ends of one step, as after each of several optimizers, the last one counts."""
        start = time.perf_counter()
        self._num_forwards += self._new_forwards
        self._new_forwards = 0
        self._settled = self._snap()
        if self._settled.sizes != self._first.sizes:  # lazy norms are there now: it begins anew
            self._first = self._settled
            self._num_steps = self._num_forwards = 0
            self._others_updates.clear()
        self.seconds += time.perf_counter() - start

    def look(self) -> None:
        """Find what has changed statistics since the last step; every step begins with it."""
        if self.has_seen_writes:
            self._settle(is_on_purpose=False)

    def accept(self) -> None:
        """Take the statistics of now: since the last step they were written on purpose, as by a re-estimation.

        Note:
            It waits for the device.
        """
        self._settle(is_on_purpose=True)

    @property
    def has_seen_writes(self) -> bool:
        """Whether statistics may be others than after the last step; torch does not count writes to a `.data`."""
        start = time.perf_counter()
        is_written = self._read_versions() != self._settled.versions
        self.seconds += time.perf_counter() - start
        return is_written or any(part.is_seen_by_value for part in self._parts)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()
        self._call_hooks.close()

    def _settle(self, *, is_on_purpose: bool) -> None:
        start = time.perf_counter()
        before, self._settled = self._settled, self._snap()
        uncounted = self._find_uncounted(before)
        for number, (counted, has_moved) in enumerate(self._compare(before, self._settled)):
            self._others_updates[number] += counted
            is_update = counted > 0 or (has_moved and number in uncounted)
            if is_update and not is_on_purpose:
                self._changed_between.setdefault(self._parts[number].path, self._iteration)
        self.seconds += time.perf_counter() - start

    # ---- what it has seen

    def collect(self) -> StepFacts:
        """The steps so far. It waits for the device."""
        start = time.perf_counter()
        uncounted = {self._parts[number].path for number in self._find_uncounted(self._settled)}
        updates: dict[str, int] = {}
        for number, (counted, _) in enumerate(self._compare(self._first, self._settled)):
            path = self._parts[number].path
            if path not in uncounted:
                updates[path] = max(counted - self._others_updates[number], updates.get(path, 0))

        self.seconds += time.perf_counter() - start
        changed, calls = dict(self._changed_between), dict(self._most_calls)
        return StepFacts(self._num_steps, self._num_forwards, updates, changed, calls)

    def diagnose(self, **options: Any) -> Diagnosis:
        """Run all checks on the model and on what was seen.

        Args:
            options: `optimizer`, `averaged` and `before`, as of `bnext.diagnose`.
        """
        return examine_facts(dataclasses.replace(collect_facts(self.model, **options), steps=self.collect()))

    def _find_uncounted(self, until: _Snapshot) -> set[int]:
        """The parts whose statistics moved in the steps while their counter, if there is one, did not."""
        changes = enumerate(self._compare(self._first, until))
        return {
            number for number, (counted, moved) in changes if moved and counted == self._others_updates[number] == 0
        }

    def _snap(self) -> _Snapshot:
        """Copy all buffers, without waiting for the device."""
        tensors: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for part in self._parts:
            for _, buffer in part.list_buffers():
                flat = buffer if buffer.dim() == 1 else buffer.reshape(-1)
                tensors.setdefault((buffer.device, buffer.dtype), []).append(flat)
        return _Snapshot(self._read_versions(), {key: torch.cat(flat) for key, flat in tensors.items()})

    def _read_versions(self) -> list[tuple[int, int]]:
        return [
            (id(buffer), 0 if buffer.is_inference() else buffer._version)
            for part in self._parts
            for _, buffer in part.list_buffers()
        ]

    def _compare(self, before: _Snapshot, after: _Snapshot) -> list[tuple[int, bool]]:
        """For each part the updates that its counter has counted, and whether its statistics are others."""
        if before.sizes != after.sizes:
            return [(0, False)] * len(self._parts)

        old = {key: flat.cpu() for key, flat in before.values.items()}
        new = {key: flat.cpu() for key, flat in after.values.items()}
        places: Counter[tuple[torch.device, torch.dtype]] = Counter()
        changes = []
        for part in self._parts:
            counted, has_moved = 0, False
            for name, buffer in part.list_buffers():
                key = (buffer.device, buffer.dtype)
                place = slice(places[key], places[key] + buffer.numel())
                places[key] = place.stop
                if name == _COUNTER:
                    counted = int(new[key][place].sum() - old[key][place].sum())
                else:
                    has_moved |= not torch.equal(old[key][place].nan_to_num(), new[key][place].nan_to_num())
            changes.append((counted, has_moved))
        return changes

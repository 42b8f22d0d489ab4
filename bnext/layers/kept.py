"""Running statistics that are kept while they are frozen, whoever reaches for them.

A norm of bnext is a `_BatchNorm`, so other code resets it (stochastic weight averaging), assigns its buffers
(re-estimations of other libraries) or writes into them (averages of weights). Frozen statistics that have been in use
are kept from the first two; a write into a tensor cannot be kept from it, but the next forward finds it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import stateless

from bnext.dispatch import is_ordinary
from bnext.errors import Refusal, StatisticsError
from bnext.layers.norm_form import POPULATION
from bnext.notices import tell_once

__all__ = ["KeptBatchNorm2d", "note_statistics"]

log = logging.getLogger(__name__)

# Part of a value by which an average of equal ones may be off: digits that thousands of steps of one have lost.
_ROUNDING = 2.0**-13
_FUNCTIONAL_CALL = stateless._functional_call.__code__
_DDP_FORWARD = DistributedDataParallel.forward.__code__
TAKEN_AWAY = Refusal(
    StatisticsError,
    "frozen running statistics",
    "be there",
    "Call unfreeze_norms(model) before they are taken away, or build the norm with frozen='none'.",
)
KEPT = (
    "Frozen statistics were kept: %s of %s was called for by %s, and not done. To write them on purpose use "
    "load_state_dict, or call unfreeze_norms first."
)
WRITTEN = (
    "Frozen statistics of %s are not those of the freeze: other code has written %s, by up to %.3g, and they "
    "normalize as they are now. Leave frozen norms out of what averages or resets buffers, and load a checkpoint to "
    "have them back."
)


class _Note(NamedTuple):
    """Frozen buffers as they were when they were last written by right.

    Args:
        values: name -> copy.
        versions: name -> which tensor it was, and how often it had been written.
    """

    values: Mapping[str, Tensor]
    versions: Mapping[str, tuple[int, int]]


class KeptBatchNorm2d(nn.BatchNorm2d):
    """A holder of running statistics that can be frozen: a norm of bnext, or the part that a level or domain owns."""

    _is_frozen = False  # its statistics
    _note: _Note | None = None  # None: they were never in use, so that whoever initializes them may
    _is_looked_at = False  # their values, since the last change of mode
    _is_rewritten = False  # with the same values, as DistributedDataParallel does in every step

    def keep_statistics(self, is_frozen: bool, is_in_use: bool = True) -> None:
        """Keep the running statistics as they are from now on, or no longer.

        Args:
            is_frozen: whether they are to be kept.
            is_in_use: whether they are worth keeping; else they are from the first forward or load on.
        """
        is_new = is_frozen and not self._is_frozen
        self._is_frozen = is_frozen
        if not is_frozen:
            self._note = None
        elif is_new and is_in_use:
            self.note_statistics()

    def note_statistics(self) -> None:
        """Take the running statistics of now for those that are frozen: they were written by right."""
        buffers = self._list_statistics()
        if not self._is_frozen or not is_ordinary():
            return
        if not _have_values(buffers):
            self._note = None
            return

        values = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self._note = _Note(values, {name: _read_version(buffer) for name, buffer in buffers.items()})

    def check_kept(self, where: str) -> None:
        """Find what other code has written into frozen statistics since the last call, and say it once.

        On a CPU values are compared. Elsewhere that would wait for the device, so it is done where torch has counted a
        write, and after a change of mode: a write through `.data`, which torch does not count, is found then, as are
        others where somebody writes the same values again and again.

        Raises:
            StatisticsError: they were taken away.
        """
        if not self._is_frozen or not is_ordinary():
            return

        taken = [name for name in POPULATION[:2] if self._buffers.get(name) is None]
        if taken:
            raise TAKEN_AWAY.of(f"None for {' and '.join(taken)}", where)
        self._find_writes(where)

    def _find_writes(self, where: str) -> None:
        note, buffers = self._note, self._list_statistics()
        if note is None or not _have_values(buffers):
            self.note_statistics()
            return

        is_same = all(note.versions.get(name) == _read_version(buffer) for name, buffer in buffers.items())
        is_on_cpu = all(buffer.device.type == "cpu" for buffer in buffers.values())
        if not is_on_cpu and self._is_looked_at and (is_same or self._is_rewritten):
            return

        self._is_looked_at = True
        kept = {name: buffer for name, buffer in buffers.items() if name in note.values}
        changes = {name: _measure_change(note.values[name], buffer) for name, buffer in kept.items()}
        changed = {name: change for name, change in changes.items() if change != 0}
        if changed and _find_call(_FUNCTIONAL_CALL) is not None:  # which lends other tensors for this call alone
            return
        if changed:
            if not _is_of_worker_0():
                tell_once(log, self, WRITTEN, where, ", ".join(changed), max(changed.values()))
            self.note_statistics()
        elif not is_same:  # with the same values, or an average of them
            self._note = note._replace(versions={name: _read_version(buffer) for name, buffer in buffers.items()})
            self._is_rewritten = True

    def _list_statistics(self) -> dict[str, Tensor]:
        buffers = {name: self._buffers.get(name) for name in POPULATION}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def _is_kept_from(self, deed: str) -> bool:
        """Whether other code is refused what it is about to do, which is said once for each place in its code."""
        if not self._is_frozen or self._note is None:
            return False

        writer = _find_caller()
        tell_once(log, (deed, writer), KEPT, deed, getattr(self, "path", "") or type(self).__name__, writer)
        return True

    # ---- what torch and other code call

    def reset_running_stats(self) -> None:
        if self._note is None or not self._is_kept_from("a reset"):
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        has_frozen_affine = not any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        if self._note is None or not has_frozen_affine or not self._is_kept_from("a reset"):
            super().reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_replaced(name, value) or not self._is_kept_from(f"an assignment to {name}"):
            super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if not self._is_replaced(name, tensor) or not self._is_kept_from(f"an assignment to {name}"):
            super().register_buffer(name, tensor, persistent)

    def _is_replaced(self, name: str, value: Any) -> bool:
        """Whether a statistic is to become another tensor; `norm.running_mean *= 0` assigns the same one."""
        return name in POPULATION and isinstance(value, Tensor) and value is not self._buffers.get(name)

    def train(self, mode: bool = True) -> Any:
        self._is_looked_at = False
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        is_frozen = self._is_frozen
        self._is_frozen = False
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        finally:
            self._is_frozen = is_frozen

        if any(f"{prefix}{name}" in state_dict for name in POPULATION):
            self.note_statistics()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """To another type or device, where they stay what they are; memory that nobody has filled is not in use."""
        if self._note is not None and is_ordinary():
            self._find_writes(getattr(self, "path", "") or type(self).__name__)
        note = self._note

        result = super()._apply(fn, recurse)
        if note is not None:
            self.note_statistics()
            if self._note is not None and not _are_equal(note.values, self._note.values):
                self._note = None
        return result


def note_statistics(module: nn.Module) -> None:
    """Take the running statistics of a norm of any library, which were just written on purpose, for frozen ones."""
    if isinstance(module, KeptBatchNorm2d):
        module.note_statistics()


def _have_values(buffers: Mapping[str, Tensor]) -> bool:
    """Whether they are ordinary tensors: not of torch's meta device, fake, or spread over devices."""
    return all(type(buffer) is Tensor and not buffer.is_meta for buffer in buffers.values())


def _read_version(buffer: Tensor) -> tuple[int, int]:
    return id(buffer), 0 if buffer.is_inference() else buffer._version


def _measure_change(before: Tensor, now: Tensor) -> float:
    """The largest difference, 0 where an average of equal values is no more than rounded; infinity: no number."""
    if before.shape != now.shape:
        return float("inf")

    before = before.to(now)
    if torch.equal(before, now):
        return 0.0

    if now.is_floating_point():
        rtol, atol = max(_ROUNDING, 16 * torch.finfo(now.dtype).eps), 0.0
    else:
        rtol, atol = 0.0, 1.0  # an average of equal counts is rounded down
    if torch.allclose(now, before, rtol=rtol, atol=atol):
        return 0.0
    change = float((now.double() - before.double()).abs().max())
    return change if change == change else float("inf")


def _find_call(code: CodeType) -> FrameType | None:
    """The call of a function that this code runs in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _is_of_worker_0() -> bool:
    """Whether DistributedDataParallel has written the buffers of worker 0, who says itself if they are wrong."""
    call = _find_call(_DDP_FORWARD)
    if call is None:
        return False
    ddp = call.f_locals["self"]
    return bool(ddp.will_sync_module_buffers()) and dist.get_rank(ddp.process_group) != 0


def _are_equal(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    return before.keys() == now.keys() and all(
        torch.equal(before[name].to(value), value) for name, value in now.items()
    )


def _find_caller() -> str:
    """File and line of the code that is neither ours nor that of torch's modules."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("bnext.", "torch.nn.modules.")):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"

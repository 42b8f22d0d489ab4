"""Re-estimation of population statistics in a training: the hook PreciseBN."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.engine import HookBase

from bnext.engine.hooks import is_due

__all__ = ["PreciseBN"]


class PreciseBN(HookBase):
    """Re-estimates the statistics before an evaluation, as detectron2's hook of this name does.

    Detectron2's cannot: fvcore's estimate refuses a norm that is used for several levels.

    Args:
        period: iterations between estimates; 0: after the last iteration only.
        recompute: does it.
    """

    def __init__(self, period: int, recompute: Callable[[], object]) -> None:
        self._period = period
        self._recompute = recompute

    def after_step(self) -> None:
        if is_due(self.trainer.iter, self._period, self.trainer.max_iter):
            self._recompute()

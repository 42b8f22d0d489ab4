"""For any torch model, without detectron2: its head repaired, its numbers with several kinds of statistics.

The room itself can be called: `bnext.repair(model, data)` is `bnext.repair.levels.repair`.
"""

import sys
from types import ModuleType

from bnext.repair.compare import compare_kinds
from bnext.repair.kinds import KINDS, Kind, normalizing_evaluation_by_mini_batch, use_kind
from bnext.repair.levels import RepairReport, repair
from bnext.repair.table import Comparison, compare_statistics

__all__ = [
    "KINDS",
    "Comparison",
    "Kind",
    "RepairReport",
    "compare_kinds",
    "compare_statistics",
    "normalizing_evaluation_by_mini_batch",
    "repair",
    "use_kind",
]


class _CallableRoom(ModuleType):
    """A package that is a function as well, by the name of both."""

    __call__ = staticmethod(repair)


sys.modules[__name__].__class__ = _CallableRoom

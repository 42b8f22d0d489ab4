"""For any torch model, without detectron2: its head repaired, its numbers by kinds of statistics, what training adds.

`bnext.repair` is the function, whatever of this room is imported; its names are imported from here.
"""

from bnext.repair.accumulation import accumulate_gradients, split_batch
from bnext.repair.averaged_weights import AveragedWeights
from bnext.repair.compare import compare_kinds
from bnext.repair.kinds import KINDS, Kind, normalizing_evaluation_by_mini_batch, use_kind
from bnext.repair.levels import RepairReport, repair
from bnext.repair.table import Comparison, compare_statistics

__all__ = [
    "KINDS",
    "AveragedWeights",
    "Comparison",
    "Kind",
    "RepairReport",
    "accumulate_gradients",
    "compare_kinds",
    "compare_statistics",
    "normalizing_evaluation_by_mini_batch",
    "repair",
    "split_batch",
    "use_kind",
]

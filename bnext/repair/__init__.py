"""For any torch model, without detectron2: its numbers with several kinds of statistics, and what training adds."""

from bnext.repair.accumulation import accumulate_gradients, split_batch
from bnext.repair.averaged_weights import AveragedWeights
from bnext.repair.compare import compare_kinds
from bnext.repair.kinds import KINDS, Kind, normalizing_evaluation_by_mini_batch, use_kind

__all__ = [
    "KINDS",
    "AveragedWeights",
    "Kind",
    "accumulate_gradients",
    "compare_kinds",
    "normalizing_evaluation_by_mini_batch",
    "split_batch",
    "use_kind",
]

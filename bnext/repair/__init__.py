"""For any torch model, without detectron2: its numbers with several kinds of statistics."""

from bnext.repair.compare import compare_kinds
from bnext.repair.kinds import KINDS, Kind, normalizing_evaluation_by_mini_batch, use_kind

__all__ = ["KINDS", "Kind", "compare_kinds", "normalizing_evaluation_by_mini_batch", "use_kind"]

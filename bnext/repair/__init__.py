"""What any model gets without detectron2: a comparison of statistics, and what comes of it."""

from bnext.repair.compare import compare_kinds
from bnext.repair.kinds import KINDS, Kind, normalizing_evaluation_by_mini_batch, use_kind

__all__ = ["KINDS", "Kind", "compare_kinds", "normalizing_evaluation_by_mini_batch", "use_kind"]

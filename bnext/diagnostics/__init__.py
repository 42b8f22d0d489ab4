"""The norms of any torch model: an inventory, and the mini-batches that they see."""

from bnext.diagnostics.inventory import (
    NormGroup,
    NormRecord,
    find_norm_groups,
    find_norm_records,
    format_norm_groups,
    group_norms,
)
from bnext.diagnostics.mini_batches import MiniBatch, describe_mini_batch, observing_mini_batches

__all__ = [
    "MiniBatch",
    "NormGroup",
    "NormRecord",
    "describe_mini_batch",
    "find_norm_groups",
    "find_norm_records",
    "format_norm_groups",
    "group_norms",
    "observing_mini_batches",
]

"""Pure arithmetic of batch normalization: tensors in, tensors out; no modules, no configuration.

Shape letters in this folder: N samples, C channels, H W, L features (levels), B mini-batches, P parts, S sources.
"""

from bnext.functional.grouping import (
    Grouping,
    Groups,
    count_elements,
    deal_samples,
    divide_parts,
    group_samples,
    make_index,
    number_groups,
)
from bnext.functional.moments import (
    Moments,
    batch_moments,
    enlarge_parts,
    find_finite,
    group_moments,
    merge_moments,
    part_moments,
    sample_moments,
    stack_parts,
    sum_groups,
    update_running_statistics,
)
from bnext.functional.normalize import normalize_mini_batch, normalize_parts
from bnext.functional.standard_errors import (
    Spread,
    merge_spreads,
    share_of_variance,
    spread_of_batch,
    standard_errors,
)

__all__ = [
    "Grouping",
    "Groups",
    "Moments",
    "Spread",
    "batch_moments",
    "count_elements",
    "deal_samples",
    "divide_parts",
    "enlarge_parts",
    "find_finite",
    "group_moments",
    "group_samples",
    "make_index",
    "merge_moments",
    "merge_spreads",
    "normalize_mini_batch",
    "normalize_parts",
    "number_groups",
    "part_moments",
    "sample_moments",
    "share_of_variance",
    "spread_of_batch",
    "stack_parts",
    "standard_errors",
    "sum_groups",
    "update_running_statistics",
]

"""Pure arithmetic of batch normalization: tensors in, tensors out; no modules, no configuration.

Shape letters in this folder: N samples, C channels, H W, L levels, B mini-batches, P parts.
"""

from bnext.functional.averaging import update_running_statistics
from bnext.functional.moments import Moments, batch_moments, group_moments, merge_moments
from bnext.functional.normalize import LevelMoments, normalize_levels

__all__ = [
    "LevelMoments",
    "Moments",
    "batch_moments",
    "group_moments",
    "merge_moments",
    "normalize_levels",
    "update_running_statistics",
]

"""Normalization layers: nn.Modules whose state-dict keys are torch's."""

from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.build import NAMED_NORMS, build_norm, make_named_norm, name_norms
from bnext.layers.cycle_batch_norm import CycleBatchNormList
from bnext.layers.deal import deal_statistics
from bnext.layers.folded_norm import FoldedNorm
from bnext.layers.groups import find_grouping_norms, use_groups
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.shuffled import Shuffled, shares_work, shuffle_features
from bnext.layers.spec import TABLE5_ROWS, NormSpec
from bnext.layers.together import normalize_together
from bnext.layers.unseen import applying_rule, forget_stream, one_forward, tell_forwards
from bnext.layers.virtual import virtual_samples

__all__ = [
    "NAMED_NORMS",
    "TABLE5_ROWS",
    "BatchNorm2d",
    "CycleBatchNormList",
    "FoldedNorm",
    "LevelBatchNorm2d",
    "NormSpec",
    "Shuffled",
    "applying_rule",
    "build_norm",
    "deal_statistics",
    "find_grouping_norms",
    "forget_stream",
    "make_named_norm",
    "name_norms",
    "normalize_together",
    "one_forward",
    "shares_work",
    "shuffle_features",
    "tell_forwards",
    "use_groups",
    "virtual_samples",
]

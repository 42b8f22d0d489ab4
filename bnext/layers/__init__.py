"""Normalization layers: nn.Modules whose state-dict keys are torch's."""

from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.build import NAMED_NORMS, build_norm, make_named_norm, name_norms
from bnext.layers.check import check_norm_state
from bnext.layers.convert import ConversionReport, convert_norm, convert_norm_state, copy_norm_state, read_caffe_state
from bnext.layers.deal import deal_statistics
from bnext.layers.fold import FoldedNorm, FoldReport, fold_norms, is_folded
from bnext.layers.freezing import freeze_norms, unfreeze_norms
from bnext.layers.groups import find_grouping_norms, set_groups, use_groups
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.schedules import interpolate, set_momentum, set_renorm_limits
from bnext.layers.scopes import frozen_statistics
from bnext.layers.shuffled import Shuffled, shares_work, shuffle_features
from bnext.layers.spec import TABLE5_ROWS, NormSpec
from bnext.layers.virtual import virtual_samples

__all__ = [
    "NAMED_NORMS",
    "TABLE5_ROWS",
    "BatchNorm2d",
    "ConversionReport",
    "FoldReport",
    "FoldedNorm",
    "LevelBatchNorm2d",
    "NormSpec",
    "Shuffled",
    "build_norm",
    "check_norm_state",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "deal_statistics",
    "find_grouping_norms",
    "fold_norms",
    "freeze_norms",
    "frozen_statistics",
    "interpolate",
    "is_folded",
    "make_named_norm",
    "name_norms",
    "read_caffe_state",
    "set_groups",
    "set_momentum",
    "set_renorm_limits",
    "shares_work",
    "shuffle_features",
    "unfreeze_norms",
    "use_groups",
    "virtual_samples",
]

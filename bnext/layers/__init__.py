"""Normalization layers: nn.Modules whose state-dict keys are torch's."""

from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.build import NAMED_NORMS, build_norm, make_named_norm, name_norms
from bnext.layers.convert import ConversionReport, convert_norm, convert_norm_state, copy_norm_state
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.scopes import frozen_statistics
from bnext.layers.spec import TABLE5_ROWS, NormSpec
from bnext.layers.virtual import virtual_samples

__all__ = [
    "NAMED_NORMS",
    "TABLE5_ROWS",
    "BatchNorm2d",
    "ConversionReport",
    "LevelBatchNorm2d",
    "NormSpec",
    "build_norm",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "frozen_statistics",
    "make_named_norm",
    "name_norms",
    "virtual_samples",
]

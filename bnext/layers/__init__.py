"""Normalization layers: nn.Modules whose state-dict keys are torch's."""

from bnext.layers.build import BATCH_NORM_WORKERS, build_norm, name_norms
from bnext.layers.convert import ConversionReport, convert_norm, convert_norm_state, copy_norm_state
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import TABLE5_ROWS, NormSpec

__all__ = [
    "BATCH_NORM_WORKERS",
    "TABLE5_ROWS",
    "ConversionReport",
    "LevelBatchNorm2d",
    "NormSpec",
    "build_norm",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "name_norms",
]

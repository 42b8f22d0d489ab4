"""Change the norms inside a model or a state dict: convert, fold, freeze, schedule, check."""

from bnext.surgery.caffe import read_caffe_state
from bnext.surgery.check_state import check_norm_state
from bnext.surgery.convert import convert_norm
from bnext.surgery.convert_state import ConversionReport, convert_norm_state, copy_norm_state
from bnext.surgery.fold import FoldReport, fold_norms
from bnext.surgery.freezing import freeze_norms, unfreeze_norms
from bnext.surgery.schedules import interpolate, set_momentum, set_renorm_limits

__all__ = [
    "ConversionReport",
    "FoldReport",
    "check_norm_state",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "fold_norms",
    "freeze_norms",
    "interpolate",
    "read_caffe_state",
    "set_momentum",
    "set_renorm_limits",
    "unfreeze_norms",
]

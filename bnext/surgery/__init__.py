"""Change the norms inside a model or a state dict: convert, fold, freeze, schedule, check."""

from bnext.surgery.caffe import read_caffe_state
from bnext.surgery.check_state import check_norm_state
from bnext.surgery.convert import convert_norm
from bnext.surgery.convert_state import ConversionReport, convert_norm_state, copy_norm_state
from bnext.surgery.domains import add_domain, drop_domain, list_domains, merge_domains, select_domain
from bnext.surgery.fold import FoldReport, fold_norms
from bnext.surgery.freezing import freeze_norms, unfreeze_norms
from bnext.surgery.schedules import interpolate, set_momentum, set_renorm_limits

__all__ = [
    "ConversionReport",
    "FoldReport",
    "add_domain",
    "check_norm_state",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "drop_domain",
    "fold_norms",
    "freeze_norms",
    "interpolate",
    "list_domains",
    "merge_domains",
    "read_caffe_state",
    "select_domain",
    "set_momentum",
    "set_renorm_limits",
    "unfreeze_norms",
]

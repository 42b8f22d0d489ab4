"""bnext: batch normalization done right in object detection.

The torch-only parts are importable from here. Where detectron2 is installed, importing bnext
registers its meta-architectures and data sets; where it is not, everything else works.
"""

import importlib.util
import warnings

from bnext.errors import (
    BNextError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DomainError,
    LaunchError,
    StatisticsError,
    WorkerError,
)
from bnext.layers import (
    BatchNorm2d,
    LevelBatchNorm2d,
    NormSpec,
    Shuffled,
    build_norm,
    deal_statistics,
    use_groups,
    virtual_samples,
)
from bnext.scope import frozen_statistics, use_domain
from bnext.statistics import following_stream, recompute_population_statistics
from bnext.surgery import (
    check_norm_state,
    convert_norm,
    convert_norm_state,
    copy_norm_state,
    fold_norms,
    freeze_norms,
    unfreeze_norms,
)

__version__ = "0.1.0"

__all__ = [
    "BNextError",
    "BatchNorm2d",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DomainError",
    "LaunchError",
    "LevelBatchNorm2d",
    "NormSpec",
    "Shuffled",
    "StatisticsError",
    "WorkerError",
    "build_norm",
    "check_norm_state",
    "convert_norm",
    "convert_norm_state",
    "copy_norm_state",
    "deal_statistics",
    "fold_norms",
    "following_stream",
    "freeze_norms",
    "frozen_statistics",
    "recompute_population_statistics",
    "unfreeze_norms",
    "use_domain",
    "use_groups",
    "virtual_samples",
]

_detectron2 = importlib.util.find_spec("detectron2")
if _detectron2 is not None and _detectron2.origin is not None:  # a bare folder of that name has no origin
    with warnings.catch_warnings():
        # fvcore and detectron2 script a few functions at import; users can do nothing about it.
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
        from bnext import heads  # registers BNextRetinaNet and BNextFCOS
        from bnext.config import add_bnext_config
        from bnext.data.catalog import register_datasets

    __all__ += ["add_bnext_config", "heads"]
    register_datasets()

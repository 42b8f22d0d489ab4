"""Config keys of bnext: their defaults, their meaning, and the check that they make sense together."""

from __future__ import annotations

import contextlib
try:
    from detectron2.config import CfgNode
    from detectron2.layers import get_norm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "detectron2 must be installed for bnext's configs, heads, data and tools; got none. Run "
        "`python tools/install_detectron2.py`, or install it from its repository or from conda-forge. "
        "bnext's layers and statistics work without it."
    ) from error

from bnext.errors import ConfigError
from bnext.layers.build import NAMED_NORMS
from bnext.layers.spec import NormSpec, check_choice

__all__ = ["LEVEL_ARCHITECTURES", "add_bnext_config", "check_config", "get_head_norm"]

# Meta-architectures whose head sees several named levels; they read MODEL.RETINANET.
LEVEL_ARCHITECTURES = ("BNextRetinaNet", "BNextFCOS")
PLACE = "MODEL.BNEXT.RETINANET"
# Other batch norms of detectron2: a head would share them over its levels without a word, as row 3 is.
UNSAFE_NORMS = ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
FIELDS = {"STATISTICS": "statistics", "POPULATION": "population", "AFFINE": "affine"}


def add_bnext_config(cfg: CfgNode) -> None:
    """Add the keys of bnext to a config, between `get_cfg()` and `merge_from_file`.

    The defaults leave detectron2's behaviour as it is: a BN in a RetinaNet head has statistics per
    level and a shared affine, as its `CycleBatchNormList` (row 4 of the paper's Table 5).
    """
    cfg.MODEL.BNEXT = CfgNode()
    cfg.MODEL.BNEXT.RETINANET = CfgNode()
    # Mini-batch statistics in SGD: all levels together ("shared") or each alone ("per_level").
    cfg.MODEL.BNEXT.RETINANET.STATISTICS = "per_level"
    # Population statistics, which normalize at inference: one set ("shared") or one "per_level".
    cfg.MODEL.BNEXT.RETINANET.POPULATION = "per_level"
    # Scale and shift: one pair ("shared") or one "per_level".
    cfg.MODEL.BNEXT.RETINANET.AFFINE = "shared"
    # "SGD" or "ADAMW"; the name and the values that other projects on detectron2 use.
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"


def get_head_norm(cfg: CfgNode) -> NormSpec | str:
    """The norm of a level-shared head: a spec for "BN" and "SyncBN", else detectron2's name of it."""
    name = cfg.MODEL.RETINANET.NORM
    if name not in NAMED_NORMS:
        return name
    answers = {field: cfg.MODEL.BNEXT.RETINANET[key] for key, field in FIELDS.items()}
    return NAMED_NORMS[name].replace(**answers)


def check_config(cfg: CfgNode) -> None:
    """Refuse keys of bnext that are unknown, contradict one another, or would have no effect.

    Raises:
        ConfigError: names the key, its value, and what is allowed.
    """
    if "BNEXT" not in cfg.MODEL:
        raise ConfigError(
            "MODEL.BNEXT must be in the config; got a config without it (check_config). "
            "Call bnext.add_bnext_config(cfg) after get_cfg() and before merge_from_file."
        )
    node = cfg.MODEL.BNEXT.RETINANET
    for key in FIELDS:
        check_choice(f"{PLACE}.{key}", node[key], ("shared", "per_level"), where="config")
    if cfg.MODEL.META_ARCHITECTURE in LEVEL_ARCHITECTURES:
        _check_norm(cfg.MODEL.RETINANET.NORM)
    default = NormSpec.from_table5_row(4)
    changed = [key for key, field in FIELDS.items() if node[key] != getattr(default, field)]
    if changed:
        _check_has_levels(cfg, f"{PLACE}.{changed[0]}", node[changed[0]])


def _check_norm(name: str) -> None:
    """The head's norm is one of ours, or one that the installed detectron2 has and that needs no levels."""
    is_known = name in NAMED_NORMS
    if not is_known and name not in UNSAFE_NORMS:
        with contextlib.suppress(KeyError):
            get_norm(name, 32)
            is_known = True
    if not is_known:
        raise ConfigError(
            f"MODEL.RETINANET.NORM must be BN, SyncBN, or a norm of the installed detectron2 that is no other batch "
            f"norm (GN, FrozenBN, ''); got {name!r}. For a mini-batch over all workers use SyncBN."
        )


def _check_has_levels(cfg: CfgNode, key: str, value: str) -> None:
    """A choice between levels needs a head of ours, with a batch norm, on several levels."""
    architecture, norm = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NORM
    if architecture not in LEVEL_ARCHITECTURES:
        raise ConfigError(
            f"{key} must keep its default in a model without a level-shared head of bnext; got {value!r} "
            f"(MODEL.META_ARCHITECTURE is {architecture!r}). Set MODEL.META_ARCHITECTURE to one of "
            f"{', '.join(LEVEL_ARCHITECTURES)}, or remove the key."
        )
    if norm not in NAMED_NORMS:
        raise ConfigError(
            f"{key} must keep its default where the head has no batch norm; got {value!r} "
            f"(MODEL.RETINANET.NORM is {norm!r}). Set MODEL.RETINANET.NORM to one of "
            f"{', '.join(NAMED_NORMS)}, or remove the key."
        )
    if len(cfg.MODEL.RETINANET.IN_FEATURES) < 2:
        raise ConfigError(
            f"{key} must keep its default where the head sees a single level; got {value!r} "
            f"(MODEL.RETINANET.IN_FEATURES is {cfg.MODEL.RETINANET.IN_FEATURES}). Name several levels there."
        )

"""Config keys of what is estimated and measured beside the training: TEST.BNEXT, its defaults and its check."""

from __future__ import annotations

import math

from detectron2.config import CfgNode

from bnext.errors import ConfigError, check_choice

__all__ = ["ESTIMATORS", "VALIDATION_STATISTICS", "add_test_keys", "check_test_keys"]

PLACE = "TEST.BNEXT"
# Of recompute_population_statistics and compute_validation_loss, which lie above this module.
ESTIMATORS = ("pooled", "mean_of_batches", "layer_by_layer", "moving_average")
VALIDATION_STATISTICS = ("population", "mini_batch")
_PRECISE_BN = {"ROIS": "sampled", "TOLERANCE": 0.0, "ESTIMATOR": "pooled", "BEFORE_CHECKPOINTS": True}
_VALIDATION_LOSS = {"PERIOD": 0, "NUM_BATCHES": 0, "STATISTICS": "population"}


def add_test_keys(cfg: CfgNode) -> None:
    """Add TEST.BNEXT; its defaults estimate nothing and measure nothing."""
    cfg.TEST.BNEXT = CfgNode()
    # How population statistics are re-estimated by TEST.PRECISE_BN, SMART_BATCH_NORM and recompute_statistics.
    node = cfg.TEST.BNEXT.PRECISE_BN = CfgNode()
    # RoIs on which those of R-CNN heads are: "sampled" as in SGD, or "top_scored" as at test.
    node.ROIS = _PRECISE_BN["ROIS"]
    # Stop as soon as all standard errors are below it, in standard deviations: 0.01 for 1 %; 0.0: never.
    node.TOLERANCE = _PRECISE_BN["TOLERANCE"]
    # "pooled", "mean_of_batches", "layer_by_layer", or "moving_average" (with fixed weights).
    node.ESTIMATOR = _PRECISE_BN["ESTIMATOR"]
    # With TEST.PRECISE_BN.ENABLED: not only before evaluations, but before every checkpoint, too.
    node.BEFORE_CHECKPOINTS = _PRECISE_BN["BEFORE_CHECKPOINTS"]
    # Mini-batches normalize in training and in its evaluations; then one epoch of estimation, and the last evaluation.
    cfg.TEST.BNEXT.SMART_BATCH_NORM = False
    # The losses on the labelled images of DATASETS.TEST.
    node = cfg.TEST.BNEXT.VALIDATION_LOSS = CfgNode()
    # Every so many iterations, and after the last one; 0: never.
    node.PERIOD = _VALIDATION_LOSS["PERIOD"]
    # On the first so many batches of SOLVER.IMS_PER_BATCH images; 0: on all.
    node.NUM_BATCHES = _VALIDATION_LOSS["NUM_BATCHES"]
    # What normalizes: the "population", or the "mini_batch", as in training.
    node.STATISTICS = _VALIDATION_LOSS["STATISTICS"]


def check_test_keys(cfg: CfgNode, *, has_roi_heads: bool = True) -> None:
    """Refuse values of TEST.BNEXT that are out of range, contradict one another, or would have no effect.

    Args:
        has_roi_heads: whether the config's model has RoI heads of bnext.

    Raises:
        ConfigError: names the key, its value, and what is allowed.
    """
    _check_precise_bn(cfg, has_roi_heads)
    if cfg.TEST.BNEXT.SMART_BATCH_NORM:
        _check_smart_batch_norm(cfg)
    _check_validation_loss(cfg)


def _check_precise_bn(cfg: CfgNode, has_roi_heads: bool) -> None:
    node, place = cfg.TEST.BNEXT.PRECISE_BN, f"{PLACE}.PRECISE_BN"
    check_choice(f"{place}.ROIS", node.ROIS, ("sampled", "top_scored"), where="config")
    check_choice(f"{place}.ESTIMATOR", node.ESTIMATOR, ESTIMATORS, where="config")
    if cfg.TEST.PRECISE_BN.ENABLED and cfg.TEST.PRECISE_BN.NUM_ITER < 1:
        raise ConfigError(
            f"TEST.PRECISE_BN.NUM_ITER must be 1 or more where TEST.PRECISE_BN.ENABLED is True; got "
            f"{cfg.TEST.PRECISE_BN.NUM_ITER} (config). Use so many batches as make some 4,000 images."
        )
    if not 0 <= node.TOLERANCE < math.inf:
        raise ConfigError(
            f"{place}.TOLERANCE must be 0 (none) or above; got {node.TOLERANCE} (config). Use 0.01 for 1 %."
        )
    if node.ROIS != "sampled" and not has_roi_heads:
        raise ConfigError(
            f"{place}.ROIS must keep its default in a model without RoI heads of bnext; got {node.ROIS!r} "
            f"(MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}). Remove the key."
        )
    if node.TOLERANCE and node.ESTIMATOR == "layer_by_layer":
        raise ConfigError(
            f"{place}.TOLERANCE must be 0 where statistics are estimated layer by layer; got {node.TOLERANCE} "
            f"({place}.ESTIMATOR is 'layer_by_layer'): every layer sees the same images. Remove one of the two."
        )
    is_estimated = cfg.TEST.PRECISE_BN.ENABLED or cfg.TEST.BNEXT.SMART_BATCH_NORM
    needs = {"TOLERANCE": is_estimated, "ESTIMATOR": is_estimated, "BEFORE_CHECKPOINTS": cfg.TEST.PRECISE_BN.ENABLED}
    for key in (key for key, has_effect in needs.items() if not has_effect and node[key] != _PRECISE_BN[key]):
        raise ConfigError(
            f"{place}.{key} must keep its default where TEST.PRECISE_BN does not re-estimate; got {node[key]!r} "
            f"(TEST.PRECISE_BN.ENABLED is False). Set TEST.PRECISE_BN.ENABLED to True, or remove the key."
        )


def _check_smart_batch_norm(cfg: CfgNode) -> None:
    freeze = cfg.SOLVER.BNEXT.FREEZE
    contradictions = {
        "TEST.PRECISE_BN.ENABLED": (cfg.TEST.PRECISE_BN.ENABLED, "no evaluation but the last uses the population"),
        "SOLVER.BNEXT.FREEZE.ITER": (
            freeze.ITER >= 0 and freeze.WHAT != "affine",
            "frozen statistics normalize in training",
        ),
    }
    for key, (is_set, reason) in contradictions.items():
        if is_set:
            raise ConfigError(
                f"{PLACE}.SMART_BATCH_NORM must be False with {key}; got True (config): {reason}. Remove one of the "
                f"two."
            )


def _check_validation_loss(cfg: CfgNode) -> None:
    node, place = cfg.TEST.BNEXT.VALIDATION_LOSS, f"{PLACE}.VALIDATION_LOSS"
    check_choice(f"{place}.STATISTICS", node.STATISTICS, VALIDATION_STATISTICS, where="config")
    for key, meaning in (("PERIOD", "never"), ("NUM_BATCHES", "all")):
        if node[key] < 0:
            raise ConfigError(f"{place}.{key} must be 0 ({meaning}) or more; got {node[key]} (config). Use 0.")
    changed = [key for key, default in _VALIDATION_LOSS.items() if node[key] != default]
    if node.PERIOD == 0 and changed:
        raise ConfigError(
            f"{place}.{changed[0]} must keep its default where no validation loss is computed; got "
            f"{node[changed[0]]!r} ({place}.PERIOD is 0). Set {place}.PERIOD, or remove the key."
        )
    if node.PERIOD and not cfg.DATASETS.TEST:
        raise ConfigError(
            f"{place}.PERIOD must be 0 without images; got {node.PERIOD} (DATASETS.TEST is empty). Name a labelled "
            f"data set there, or set it to 0."
        )

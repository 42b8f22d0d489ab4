"""SHUFFLE of a RoI head: the RoIs of all workers are dealt out at random, by statistics or by moving features."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import ConfigError
from bnext.heads.roi import find_roi_heads
from bnext.layers import BatchNorm2d, deal_statistics, shuffle_features

__all__ = ["shuffle_heads"]

PLACES_OF_HEADS = {"box_head": "ROI_BOX_HEAD", "mask_head": "ROI_MASK_HEAD", "keypoint_head": "ROI_KEYPOINT_HEAD"}


def shuffle_heads(model: nn.Module, cfg: CfgNode) -> None:
    """Attach to the heads of a detectron2 R-CNN the shuffle that their nodes ask for.

    Args:
        model: with the norms of the config.
        cfg: checked by `check_config`.

    Raises:
        ConfigError: a head has nothing that couples RoIs, or its features cannot be moved.
    """
    for name, head in find_roi_heads(model):
        node = cfg.MODEL.BNEXT.get(PLACES_OF_HEADS.get(name, ""), {})
        form = node.get("SHUFFLE", "none")
        if form == "none":
            continue
        key = f"MODEL.BNEXT.{PLACES_OF_HEADS[name]}.SHUFFLE"
        _check_couples(head, form, key)
        if form == "statistics":
            deal_statistics(head, node.SHUFFLE_GROUPS or None)
        else:
            _move_features(head, f"roi_heads.{name}", key)


def _check_couples(head: nn.Module, form: str, key: str) -> None:
    """Without a norm that couples RoIs a shuffle changes nothing; what a head of somebody else does is not known."""
    kind = BatchNorm2d if form == "statistics" else _BatchNorm
    is_foreign = form == "features" and not type(head).__module__.startswith("detectron2.")
    if not is_foreign and not any(isinstance(part, kind) for part in head.modules()):
        raise ConfigError(
            f"{key} must be 'none' in a head without batch norm; got {form!r} ({type(head).__name__}). "
            f"Set the head's NORM to BN, or remove the key."
        )


def _move_features(head: Any, where: str, key: str) -> None:
    """The part of a head that maps features to features gets random RoIs; losses are made at home."""
    if isinstance(head, (BaseMaskRCNNHead, BaseKeypointRCNNHead)):
        head.layers = _ShuffledCall(head, "layers", where)
    elif type(head).__module__.startswith("detectron2.") or where == "roi_heads.box_head":
        head.forward = _ShuffledCall(head, "forward", where)
    else:
        raise ConfigError(
            f"{key} must be 'none' or 'statistics' in a head that is no BaseMaskRCNNHead or BaseKeypointRCNNHead of "
            f"detectron2; got 'features' ({type(head).__name__}). Derive it from one of them, whose `layers` can be "
            f"shuffled, or use 'statistics'."
        )


class _ShuffledCall:
    """A method of a head's class, on random RoIs of all workers. It takes the method's place in the head alone."""

    def __init__(self, head: nn.Module, method: str, where: str) -> None:
        self._head, self._method, self._where = head, method, where

    def __call__(self, features: Tensor) -> Tensor:
        def call(rows: Tensor) -> Tensor:
            return getattr(type(self._head), self._method)(self._head, rows)

        return shuffle_features(self._head, call, features, "all", self._where)

"""SHUFFLE of a RoI head: the RoIs of all workers are dealt out at random, by statistics or by moving features."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.config.places import PLACES, get_place_norm, has_place
from bnext.distributed import get_world_size, resolve_group
from bnext.errors import ConfigError, StatisticsError
from bnext.heads.roi import find_roi_heads
from bnext.layers import BatchNorm2d, NormSpec, deal_statistics, shuffle_features

__all__ = ["shuffle_heads"]

PLACES_OF_HEADS = {"box_head": "ROI_BOX_HEAD", "mask_head": "ROI_MASK_HEAD", "keypoint_head": "ROI_KEYPOINT_HEAD"}


def shuffle_heads(model: nn.Module, cfg: CfgNode) -> None:
    """Attach to the heads of a detectron2 R-CNN the shuffle that their nodes ask for.

    Args:
        model: with the norms of the config.
        cfg: checked by `check_config`.

    Raises:
        ConfigError: there is no such head, it has nothing that couples RoIs, or its features cannot be moved.
    """
    for name, place in PLACES_OF_HEADS.items():
        node = cfg.MODEL.BNEXT[place]
        if node.SHUFFLE == "none" or not has_place(cfg, place):
            continue
        heads = [head for found, head in find_roi_heads(model) if found == name]
        _check_couples(heads, node.SHUFFLE, place, cfg.MODEL.ROI_HEADS.NAME)
        key = f"MODEL.BNEXT.{place}.SHUFFLE"
        _Teller(heads[0], cfg, place)
        for head in heads:
            if node.SHUFFLE == "statistics":
                _deal(head, node, key)
            else:
                _move_features(head, f"roi_heads.{name}", key)


def _deal(head: nn.Module, node: CfgNode, key: str) -> None:
    try:
        deal = deal_statistics(head, node.SHUFFLE_GROUPS or None)
    except (ConfigError, StatisticsError) as error:
        raise ConfigError(f"{key} 'statistics' does not fit the head: {error}") from error
    deal.remedy = f"Use more workers, or set {key}_GROUPS to 2 or more ({key} is 'statistics')."


class _Teller:
    """Says, in the first training step of a head, what its shuffle deals; and where that can be of no use."""

    def __init__(self, head: nn.Module, cfg: CfgNode, place: str) -> None:
        self._node, self._place = cfg.MODEL.BNEXT[place], place
        spec = get_place_norm(cfg, place)
        is_dealt = self._node.SHUFFLE == "statistics" and isinstance(spec, NormSpec)
        self._workers = spec.workers if is_dealt else "all"
        self._images, self._rois = cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        self._handle = head.register_forward_pre_hook(self._tell)

    def _tell(self, head: nn.Module, args: Any) -> None:
        if not head.training:
            return
        self._handle.remove()
        group = resolve_group(self._workers)
        num_workers = get_world_size(group) if group is not None else 1
        num_groups = self._node.SHUFFLE_GROUPS or num_workers
        num_images = self._images * num_workers // get_world_size()
        form, key = self._node.SHUFFLE, f"MODEL.BNEXT.{self._place}"
        what = f"RoIs of {num_images} image(s) on {num_workers} worker(s) are dealt to {num_groups} group(s)"
        logger = logging.getLogger(__name__)
        if num_groups == 1 and form == "statistics":
            return  # the deal says it
        if num_groups == 1:
            logger.warning(
                "%s.SHUFFLE features has no use: %s. Use more workers, or on one worker with several images SHUFFLE "
                "statistics and SHUFFLE_GROUPS.",
                *(key, what),
            )
        elif num_images < 2:
            remedy = "Use more workers, or more images per worker."
            logger.warning("%s.SHUFFLE %s has no use: %s. %s", key, form, what, remedy)
        elif num_groups * 2 > num_images * self._rois:
            logger.warning(
                "%s.SHUFFLE_GROUPS leaves most groups with a RoI or none: %s, of %d RoIs at most. Use fewer groups.",
                *(key, what, num_images * self._rois),
            )
        else:
            logger.info("%s.SHUFFLE %s: %s.", key, form, what)


def _check_couples(heads: list[nn.Module], form: str, place: str, roi_heads: str) -> None:
    """Without a norm that couples RoIs a shuffle changes nothing; what a head of somebody else does is not known."""
    key = f"MODEL.BNEXT.{place}.SHUFFLE"
    if not heads:  # C4's box head is the last stage of the backbone
        raise ConfigError(
            f"{key} must be 'none' where the RoI heads have no such head; got {form!r} (MODEL.ROI_HEADS.NAME is "
            f"{roi_heads!r}). Take StandardROIHeads or CascadeROIHeads, or remove the key."
        )
    kind = BatchNorm2d if form == "statistics" else _BatchNorm
    for head in heads:
        is_foreign = form == "features" and not type(head).__module__.startswith("detectron2.modeling.")
        if not is_foreign and not any(isinstance(part, kind) for part in head.modules()):
            raise ConfigError(
                f"{key} must be 'none' in a head without batch norm; got {form!r} ({type(head).__name__}). "
                f"Set {PLACES[place].norm} to BN, or remove the key."
            )


def _move_features(head: Any, where: str, key: str) -> None:
    """The part of a head that maps features to features gets random RoIs; losses are made at home."""
    head.shares_samples = True
    if isinstance(head, (BaseMaskRCNNHead, BaseKeypointRCNNHead)):
        head.layers = _ShuffledCall(head, "layers", where)
        head.register_forward_hook(head.layers.check_used)
    elif where == "roi_heads.box_head":
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
        self._is_used = False

    def check_used(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A user's head may have a `forward` of its own; without this its RoIs would silently stay."""
        if not self._is_used:
            raise ConfigError(
                f"SHUFFLE must be 'none' or 'statistics' in a head whose forward does not call its `{self._method}`; "
                f"got 'features' ({self._where}, {type(head).__name__}). Let `{self._method}` map features to logits."
            )

    def __call__(self, features: Tensor) -> Tensor:
        self._is_used = True

        def call(rows: Tensor) -> Tensor:
            return getattr(type(self._head), self._method)(self._head, rows)

        return shuffle_features(self._head, call, features, "all", self._where)

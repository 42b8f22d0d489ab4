"""SHUFFLE of a RoI head: the RoIs of all workers are dealt out at random, by statistics or by moving features."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.config.places import PLACES
from bnext.config.recipe import NormRecipe, PlaceNorm
from bnext.distributed import get_world_size, resolve_group
from bnext.errors import ConfigError, StatisticsError
from bnext.heads.roi import find_roi_heads
from bnext.layers import deal_statistics, shuffle_features

__all__ = ["shuffle_heads"]

HEADS_OF_PLACES = {"ROI_BOX_HEAD": "box_head", "ROI_MASK_HEAD": "mask_head", "ROI_KEYPOINT_HEAD": "keypoint_head"}


def shuffle_heads(model: Any, norms: NormRecipe) -> None:
    """Attach to the heads of a detectron2 R-CNN the shuffle that is asked for.

    Args:
        model: has its norms.
        norms: of its places.

    Raises:
        ConfigError: a head has nothing that couples RoIs, or its features cannot be moved.
    """
    for place, name in HEADS_OF_PLACES.items():
        norm = norms.places.get(place)
        if norm is None or norm.shuffle == "none":
            continue

        _Teller(model.roi_heads, name, norm)
        for head in [head for other, head in find_roi_heads(model) if other == name]:
            if norm.shuffle == "statistics":
                _deal(head, norm)
            else:
                _move_features(head, name, norm)


def _deal(head: nn.Module, norm: PlaceNorm) -> None:
    key = f"MODEL.BNEXT.{norm.place}.SHUFFLE"
    try:
        deal = deal_statistics(head, norm.shuffle_groups or None)
    except (ConfigError, StatisticsError) as error:
        raise ConfigError(f"{key} 'statistics' does not fit the head: {error}") from error
    deal.remedy = f"Use more workers, or set {key}_GROUPS to 2 or more ({key} is 'statistics')."


class _Teller:
    """Says, in the first training step of a head, what its shuffle deals; and where that can be of no use."""

    def __init__(self, rois: nn.Module, name: str, norm: PlaceNorm) -> None:
        self._name, self._norm = name, norm
        self._handle = rois.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _tell(self, rois: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not getattr(rois, self._name).training:
            return
        self._handle.remove()

        shuffle = self._norm.shuffle
        group = resolve_group(self._norm.spec.workers if shuffle == "statistics" else "all")
        num_workers = get_world_size(group) if group is not None else 1
        num_groups = self._norm.shuffle_groups or num_workers
        num_images = len(args[0] if args else kwargs["images"]) * num_workers
        num_rois = num_images * getattr(rois, "batch_size_per_image", num_groups)

        key, logger = f"MODEL.BNEXT.{self._norm.place}.SHUFFLE", logging.getLogger(__name__)
        deal = f"RoIs of {num_images} image(s) on {num_workers} worker(s) are dealt to {num_groups} group(s)"
        if num_groups == 1:
            remedy = "Use more workers, or on one worker with several images SHUFFLE statistics and SHUFFLE_GROUPS."
            if shuffle == "features":  # of statistics, the deal says it
                logger.warning("%s features has no use: %s. %s", key, deal, remedy)
        elif num_images < 2:
            remedy = "Use more workers, or more images per worker."
            logger.warning("%s %s has no use: %s. %s", key, shuffle, deal, remedy)
        elif num_groups * 2 > num_rois:
            deal = f"{deal}, of {num_rois} RoIs at most"
            logger.warning("%s_GROUPS leaves most groups with a RoI or none: %s. Use fewer groups.", key, deal)
        else:
            logger.info("%s %s: %s.", key, shuffle, deal)


def _move_features(head: Any, name: str, norm: PlaceNorm) -> None:
    """The part of a head that maps features to features gets random RoIs; losses are made at home."""
    key, where = f"MODEL.BNEXT.{norm.place}.SHUFFLE", f"roi_heads.{name}"
    # What a head of somebody else does is not known.
    is_of_detectron2 = type(head).__module__.startswith("detectron2.modeling.")
    if is_of_detectron2 and not any(isinstance(part, _BatchNorm) for part in head.modules()):
        remedy = f"Set {PLACES[norm.place].norm} to BN, or remove the key."
        rule = "be 'none' in a head without batch norm"
        raise ConfigError.of(key, rule, got="'features'", where=type(head).__name__, remedy=remedy)

    head.shares_samples = True

    if isinstance(head, (BaseMaskRCNNHead, BaseKeypointRCNNHead)):
        head.layers = _ShuffledCall(head, "layers", where)
        head.register_forward_hook(head.layers.check_used)
    elif name == "box_head":
        head.forward = _ShuffledCall(head, "forward", where)
    else:
        raise ConfigError.of(
            key,
            "be 'none' or 'statistics' in a head that is no BaseMaskRCNNHead or BaseKeypointRCNNHead of detectron2",
            got="'features'",
            where=type(head).__name__,
            remedy="Derive it from one of them, whose `layers` can be shuffled, or use 'statistics'.",
        )


class _ShuffledCall:
    """A method of a head's class, on random RoIs of all workers. It takes the method's place in the head alone."""

    def __init__(self, head: nn.Module, method: str, where: str) -> None:
        self._head, self._method, self._where = head, method, where
        self._is_used = False

    def __call__(self, features: Tensor) -> Tensor:
        self._is_used = True

        def call(rows: Tensor) -> Tensor:
            return getattr(type(self._head), self._method)(self._head, rows)

        return shuffle_features(self._head, call, features, "all", self._where)

    def check_used(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A user's head may have a `forward` of its own; without this its RoIs would silently stay."""
        if not self._is_used:
            raise ConfigError.of(
                "SHUFFLE",
                f"be 'none' or 'statistics' in a head whose forward does not call its `{self._method}`",
                got="'features'",
                where=f"{self._where}, {type(head).__name__}",
                remedy=f"Let `{self._method}` map features to logits.",
            )

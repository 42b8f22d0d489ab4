"""Images as a frozen trunk leaves them: features, proposals, objects. A head is trained on them in minutes.

The trunk of a detector (backbone, FPN, RPN) is run once over a set, normalized by its population statistics, so that
what is special of an image stays in its features. A step of a head is then RoIAlign and the head alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn

from bnext.data.batches import build_validation_batches
from bnext.progress import track

__all__ = ["CachedImage", "cache_images", "join_features"]


@dataclass(frozen=True)
class CachedImage:
    """An image after the trunk.

    Args:
        image_id: of its record.
        features: level -> [C, H, W].
        proposals: of the RPN, the best first.
        targets: its objects, as in training.
    """

    image_id: Any
    features: dict[str, Tensor]
    proposals: Instances
    targets: Instances


@torch.no_grad()
def cache_images(cfg: CfgNode, model: nn.Module, name: str, limit: int | None = None) -> list[CachedImage]:
    """Run the trunk of an R-CNN over the images of a set, without augmentations.

    Args:
        cfg: of the model; INPUT.* of the test is read.
        model: a GeneralizedRCNN in evaluation mode, whose RPN gives MODEL.RPN.POST_NMS_TOPK_TEST proposals.
        name: a registered, labelled set.
        limit: so many of its first images; None: all.

    Returns:
        The images in the order of the set, about 350 KB each for pictures of 128 pixels and 64 channels.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES = 0 if limit is None else -(-limit // 8)

    images: list[CachedImage] = []
    for batch in track(build_validation_batches(cfg, name), f"features of {name}"):
        preprocessed = model.preprocess_image(batch)
        features = model.backbone(preprocessed.tensor)
        proposals, _ = model.proposal_generator(preprocessed, features, None)
        wanted = model.roi_heads.in_features

        for index, record in enumerate(batch):
            of_image = {level: features[level][index].clone() for level in wanted}
            images.append(CachedImage(record["image_id"], of_image, proposals[index], record["instances"]))
    return images[:limit]


def join_features(images: Sequence[CachedImage]) -> dict[str, Tensor]:
    """Level -> features of a batch, [N, C, H, W]."""
    return {level: torch.stack([image.features[level] for image in images]) for level in images[0].features}

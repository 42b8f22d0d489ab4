"""The share of a feature's variance that lies between images: what a mini-batch of one image does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from rcnn_features import CachedImage, join_features
from torch import Tensor

from bnext.evaluation.leakage import use_inference
from bnext.functional import group_moments, sample_moments
from bnext.layers.walk import find_bnext_norms
from bnext.scope.model import setting
from bnext.seeding import seeded

__all__ = ["measure_shares", "share_between_groups"]


def share_between_groups(features: Tensor, numbers: Tensor, num_groups: int) -> Tensor:
    """The share of the variance of each channel that is between groups of samples.

        share = sum_g n_g (mean_g - mean)^2 / sum_g n_g (var_g + (mean_g - mean)^2)

    Args:
        features: [N, C, H, W].
        numbers: [N], the group of each sample, 0 to `num_groups` - 1; none is empty.

    Returns:
        [C], 0 to 1; 0 for a channel that is constant. Random groups have a small share, too.
    """
    samples = sample_moments(features.double())
    groups = group_moments(samples, numbers, num_groups)
    total = group_moments(samples, torch.zeros_like(numbers), 1)

    weight = (groups.count / groups.count.sum()).unsqueeze(1)
    between = (weight * (groups.mean - total.mean).square()).sum(0)
    return between / total.var[0].clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def measure_shares(model: Any, images: Sequence[CachedImage], seed: int) -> dict[str, float]:
    """The share between images, mean over channels, of RoIs that are sampled as in training.

    Args:
        model: a detector whose box head has norms of bnext; it is normalized by its population statistics.
        images: see `CachedImage`.
        seed: of the sampled RoIs.

    Returns:
        "pooled": of the features that the head gets; "random": of these in random groups of the same sizes, which is
        what chance gives; "norm1", ...: of the features that each norm of the head gets.
    """
    heads = model.roi_heads
    inputs: dict[str, Tensor] = {}
    handles = []
    for index, norm in enumerate(find_bnext_norms(heads.box_head).values()):
        name = f"norm{index + 1}"
        handles.append(norm.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]})))

    try:
        with use_inference(model, "population"), setting(model.modules(), training=False), seeded(seed), EventStorage():
            features = join_features(images)
            proposals = [image.proposals for image in images]
            sampled = heads.label_and_sample_proposals(proposals, [image.targets for image in images])
            levels = [features[level] for level in heads.box_in_features]
            inputs["pooled"] = heads.box_pooler(levels, [each.proposal_boxes for each in sampled])
            heads.box_head(inputs["pooled"])

            num_rois = torch.tensor([len(each) for each in sampled])
            numbers = torch.arange(len(images)).repeat_interleave(num_rois)
            shuffled = numbers[torch.randperm(len(numbers))]
    finally:
        for handle in handles:
            handle.remove()

    shares = {name: float(share_between_groups(x, numbers, len(images)).mean()) for name, x in inputs.items()}
    shares["random"] = float(share_between_groups(inputs["pooled"], shuffled, len(images)).mean())
    return shares

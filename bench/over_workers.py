"""Row 1 over two workers whose images are not as many, or not as large: every position counts once, without a copy."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling.meta_arch import retinanet as detectron2_retinanet
from torch import nn

from bench.harness import CHANNELS, Comparison, Features, Shapes
from bench.levels import PYRAMID, concatenate, split
from bench.traffic import Traffic
from bnext import LevelBatchNorm2d, NormSpec
from bnext.heads.retinanet import RetinaNetHead

__all__ = ["ROWS"]

WORKERS = 2
NUM_IMAGES = (3, 1)  # by worker
SMALL_SIDES = {"p3": (80, 108), "p4": (40, 54), "p5": (20, 27), "p6": (10, 14), "p7": (5, 7)}  # of 640 x 864 pixels
SHARED = NormSpec.from_table5_row(1)


def list_unequal_numbers(rank: int) -> Shapes:
    """Features of a worker with more images than another one."""
    return {level: (NUM_IMAGES[rank], *shape[1:]) for level, shape in PYRAMID.items()}


def list_unequal_sizes(rank: int) -> Shapes:
    """Features of a worker with larger images than another one."""
    small = {level: (2, CHANNELS, *side) for level, side in SMALL_SIDES.items()}
    return PYRAMID if rank == 0 else small


def make_ours() -> nn.Module:
    """Row 1 over all workers."""
    return LevelBatchNorm2d(CHANNELS, tuple(PYRAMID), SHARED.replace(workers="all"))


class ConcatenatedSyncBatchNorm(NaiveSyncBatchNorm):
    """Row 1 as it is usually written with Detectron2: flatten, concatenate, its norm over workers, split."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, stats_mode="N")

    def forward(self, features: Features) -> Features:
        return split(super().forward(concatenate(features)), features)


class Exact(nn.Module):
    """Row 1 over all workers by its definition: sums of all positions, then squares about their mean; no affine."""

    def forward(self, features: Features) -> Features:
        rows = torch.cat([feature.transpose(0, 1).flatten(1) for feature in features.values()], dim=1)

        count = rows.new_tensor(rows.shape[1])
        total = rows.sum(1)
        dist.all_reduce(count)
        dist.all_reduce(total)
        mean = (total / count).unsqueeze(1)

        squares = (rows - mean).square().sum(1)
        dist.all_reduce(squares)
        deviation = (squares / count + 1e-5).sqrt()
        return {level: (x - mean.unsqueeze(2)) / deviation.view(-1, 1, 1) for level, x in features.items()}


def list_input_shapes(shapes: Shapes) -> list[ShapeSpec]:
    """As a head of Detectron2 is told of its inputs."""
    return [ShapeSpec(channels=shape[1]) for shape in shapes.values()]


HEAD_SHAPES = {level: (1, 32, *shape[2:]) for level, shape in list_unequal_sizes(1).items()}
HEAD = {"num_classes": 2, "num_anchors": 1, "conv_dims": [32] * 4, "input_shape": list_input_shapes(HEAD_SHAPES)}


class OurTowers(nn.Module):
    """Both towers of our head, which see all levels side by side; their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.head = RetinaNetHead(levels=tuple(HEAD_SHAPES), norm=SHARED.replace(workers="all"), **HEAD)

    def forward(self, features: Features) -> Features:
        towers = self.head.forward_towers(list(features.values()))
        pairs = zip(features, *towers.values(), strict=True)
        return {level: scores + boxes for level, scores, boxes in pairs}


class TheirTowers(nn.Module):
    """Both towers of Detectron2's head with a norm over workers, which sees level after level; their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.head = detectron2_retinanet.RetinaNetHead(norm="naiveSyncBN_N", **HEAD)

    def forward(self, features: Features) -> Features:
        head = self.head
        return {level: head.cls_subnet(feature) + head.bbox_subnet(feature) for level, feature in features.items()}


over_workers = partial(
    Comparison,
    peer="concatenate, NaiveSyncBN, split",
    make_ours=make_ours,
    make_other=ConcatenatedSyncBatchNorm,
    sees_all=True,
    num_workers=WORKERS,
    goals={"NCHW": 2.0, "channels_last": 2.0},
    shows_errors=True,
    make_reference=Exact,
    error_goal=1e-6,
)

ROWS = [
    over_workers(
        "row 1 on 2 workers, 3 images and 1",
        shapes=list_unequal_numbers,
        averages_differ="as Detectron2 keeps the variance of the mini-batch, torch and we an estimate for all data",
    ),
    over_workers(
        "row 1 on 2 workers, 800 x 1344 and 640 x 864",
        shapes=list_unequal_sizes,
        differs="as NaiveSyncBN weights workers by their images, not by their positions",
    ),
    Traffic(
        "towers of RetinaNet's head, row 1",
        "NaiveSyncBN per level",
        HEAD_SHAPES,
        OurTowers,
        TheirTowers,
        num_workers=WORKERS,
        sees_all=True,
        most_calls=8,
    ),
]

"""Box heads whose mini-batches are the RoIs of an image, of random groups, of all: training, statistics, AP.

Everything is of detectron2 and bnext: the RoI heads with their sampler and losses, the norms, the evaluator. One
process stands for a worker per image: Ghost BN by image is what per-worker BN is with one image per worker.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from rcnn_features import CachedImage, join_features
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from bnext.evaluation.coco_evaluator import COCOEvaluator
from bnext.evaluation.leakage import use_inference
from bnext.layers.walk import find_bnext_norms
from bnext.progress import track
from bnext.seeding import Purpose, derive_seed, seeded
from bnext.statistics import recompute_population_statistics

__all__ = ["ARMS", "build_detector", "compute_losses", "estimate_populations", "measure_ap", "set_arm", "train_head"]

ARMS = {
    "one_image": "per-worker BN, one image",
    "dealt": "per-worker BN, dealt",
    "all": "SyncBN",
    "gn": "GN",
}


POPULATION_BATCHES = 60


def set_arm(cfg: CfgNode, arm: str) -> CfgNode:
    """The config with the norm of an arm in its box head."""
    cfg = cfg.clone()
    cfg.defrost()
    head, place = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.BNEXT.ROI_BOX_HEAD

    head.NORM = "GN" if arm == "gn" else "BN"
    if arm == "one_image":
        place.NORMALIZATION_BATCH_SIZE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    if arm == "dealt":
        place.WORKERS, place.SHUFFLE, place.SHUFFLE_GROUPS = "all", "statistics", cfg.SOLVER.IMS_PER_BATCH
    return cfg


def build_detector(cfg: CfgNode, seed: int) -> nn.Module:
    """An R-CNN with a head of random weights; its trunk is not used."""
    with seeded(derive_seed(seed, Purpose.INITIALIZE)):
        return build_model(cfg)


def compute_losses(model: Any, images: Sequence[CachedImage]) -> dict[str, Tensor]:
    """Detectron2's losses of the box head for RoIs that are sampled from the proposals of these images."""
    proposals = [image.proposals for image in images]
    targets = [image.targets for image in images]
    losses: dict[str, Tensor] = model.roi_heads(images, join_features(images), proposals, targets)[1]
    return losses


def train_head(cfg: CfgNode, model: nn.Module, images: Sequence[CachedImage], seed: int) -> list[float]:
    """Train the box head with AdamW and a cosine; the same seed gives the same images and RoIs in every arm.

    Args:
        cfg: SOLVER.BASE_LR, WEIGHT_DECAY, WARMUP_ITERS, MAX_ITER and IMS_PER_BATCH are read.
        model: of `build_detector`.
        images: for training.
        seed: of the order of images, and of the sampled RoIs.

    Returns:
        The loss of every step.
    """
    solver = cfg.SOLVER
    optimizer = AdamW(model.roi_heads.parameters(), lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)

    def find_factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(solver.WARMUP_ITERS, 1))
        return warmup * 0.5 * (1 + math.cos(math.pi * step / solver.MAX_ITER))

    schedule = LambdaLR(optimizer, find_factor)
    order = torch.Generator().manual_seed(derive_seed(seed, Purpose.ORDER))
    model.train()

    curve: list[float] = []
    queue: list[int] = []
    with EventStorage():
        for step in track(range(solver.MAX_ITER), "training a head"):
            if len(queue) < solver.IMS_PER_BATCH:
                queue = torch.randperm(len(images), generator=order).tolist()
            batch = [images[queue.pop()] for _ in range(solver.IMS_PER_BATCH)]

            with seeded(derive_seed(seed, Purpose.STEP, step)):
                loss = sum(compute_losses(model, batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.append(float(loss.detach()))
    return curve


def estimate_populations(cfg: CfgNode, model: Any, images: Sequence[CachedImage], seed: int) -> None:
    """Re-estimate the population statistics of the head, on RoIs as in training; mini-batches are those of the arm."""
    if not find_bnext_norms(model.roi_heads):
        return

    size = cfg.SOLVER.IMS_PER_BATCH
    batches = [images[start : start + size] for start in range(0, len(images) - size + 1, size)][:POPULATION_BATCHES]

    def forward(heads: Any, batch: Sequence[CachedImage]) -> None:
        sampled = heads.label_and_sample_proposals([i.proposals for i in batch], [i.targets for i in batch])
        features = join_features(batch)
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [p.proposal_boxes for p in sampled])
        heads.box_head(pooled)

    with EventStorage():
        recompute_population_statistics(
            model.roi_heads, batches, forward=forward, seed=derive_seed(seed, Purpose.REESTIMATE)
        )


@torch.no_grad()
def measure_ap(cfg: CfgNode, model: Any, images: Sequence[CachedImage], name: str, inference: str) -> float:
    """Box AP on a set, 0 to 100, by "population" statistics or by a "mini_batch", the RoIs of one image."""
    has_choice = bool(find_bnext_norms(model.roi_heads))
    within = use_inference(model, inference) if has_choice else contextlib.nullcontext()
    evaluator = COCOEvaluator(cfg, name, "")
    evaluator.reset()
    model.eval()

    top = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    with within:
        for start in range(0, len(images), 8):
            batch = images[start : start + 8]
            proposals = [image.proposals[:top] for image in batch]
            detections, _ = model.roi_heads(None, join_features(batch), proposals)
            for image, instances in zip(batch, detections, strict=True):
                evaluator.process([{"image_id": image.image_id}], [{"instances": instances}])

    evaluator.image_ids = [image.image_id for image in images]
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        metrics: Mapping[str, Any] = evaluator.evaluate()
    ap = metrics.get("bbox", {}).get("AP", math.nan)
    return 0.0 if math.isnan(ap) else float(ap)

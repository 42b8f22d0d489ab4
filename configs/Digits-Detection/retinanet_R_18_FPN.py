"""retinanet_R_18_FPN.yaml as a LazyConfig of detectron2: the same model, data and schedule.

bnext train --config-file Digits-Detection/retinanet_R_18_FPN.py train.max_iter=400 norms.RETINANET.STATISTICS=shared
"""

import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

model = L(RetinaNet)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=["res3", "res4", "res5"],
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=64,
        top_block=L(LastLevelP6P7)(in_channels=512, out_channels="${..out_channels}"),
    ),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=64)] * 5,
        num_classes="${..num_classes}",
        conv_dims=[64, 64, 64, 64],
        num_anchors=3,
        prior_prob=0.05,  # few objects and few iterations: begin with a larger prior and weigh objects more
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        # half of COCO's, as digits are 11 to 115 pixels high; one shape, a little higher than wide
        sizes=[[side * 2 ** (third / 3) for third in range(3)] for side in (16, 32, 64, 128, 256)],
        aspect_ratios=[1.4],
        strides=[8, 16, 32, 64, 128],
        offset=0.5,  # the only cell of p7 is centred on the picture, not on its corner
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
    num_classes=10,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    focal_loss_alpha=0.5,
    focal_loss_gamma=2.0,
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
    input_format="BGR",
)

# Places and keys of MODEL.BNEXT (configs/README.md), for the norms of detectron2's model.
norms = dict(RESNETS=dict(NORM="BN"), RETINANET=dict(NORM="BN"))

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_train"),
        mapper=L(DatasetMapper)(
            is_train=True,  # without a flip, as a mirrored digit is another sign
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=128, max_size=1333)],
            image_format="${model.input_format}",
        ),
        total_batch_size=8,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=128, max_size=1333)],
            image_format="${model.input_format}",
        ),
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
)

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.001, weight_decay=0.05
)

train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=800,
    checkpointer=dict(period=400),
    eval_period=0,
    amp=dict(enabled=False),
    device="cuda",
    seed=1,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0), warmup_factor=0.001, warmup_length=50 / 800
)

# Keys of Detectron2 and bnext that a LazyConfig has no name for.
keys = {"TEST.PRECISE_BN.NUM_ITER": 50}

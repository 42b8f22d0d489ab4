"""A LazyConfig in the manner of detectron2's ViTDet and MViTv2, which 0.6 does not have, very small."""

from functools import partial

import torch
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from tests.engine.simple_pyramid import PlainNet, SimpleFeaturePyramid, find_layer_decay, list_decayed_params

from ..tiny_lazy import dataloader, model, train  # noqa: F401

model.backbone = L(SimpleFeaturePyramid)(
    net=L(PlainNet)(width=16, depth=1, norm_layer=partial(nn.LayerNorm, eps=1e-6)), out_channels=16, norm="LN"
)
model.head.input_shape = [L(ShapeSpec)(channels=16)] * 3
model.head_in_features = ["p3", "p4", "p5"]
model.anchor_generator.update(sizes=[[16], [32], [64]], strides=[8, 16, 32])
model.head.num_anchors = 3

train.max_iter = 2
train.ddp.fp16_compression = True

optimizer = L(torch.optim.AdamW)(
    params=L(list_decayed_params)(lr_factor_func=partial(find_layer_decay, num_layers=2, decay=0.5), base_lr="${..lr}"),
    lr=0.001,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[1], num_updates=train.max_iter),
    warmup_length=1 / train.max_iter,
    warmup_factor=0.001,
)

"""A training in seconds from a LazyConfig, in the manner of tiny.yaml: detectron2's RetinaNet, norms by `norms`."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from tests.stock import load_stock_config

model = load_stock_config("common/models/retinanet.py").model
dataloader = load_stock_config("common/data/coco.py").dataloader
optimizer = load_stock_config("common/optim.py").SGD
train = load_stock_config("common/train.py").train

model.backbone.bottom_up.stem.norm = "BN"
model.backbone.bottom_up.stages = {"_target_": model.backbone.bottom_up.stages._target_, "depth": 18, "norm": "BN"}
model.backbone.update(out_channels=16)
model.backbone.top_block.in_channels = 512
model.head.update(input_shape=[L(ShapeSpec)(channels=16)] * 5, conv_dims=[16])
model.num_classes = 10
norms = dict(RESNETS=dict(NORM="BN"), RETINANET=dict(NORM="BN", STATISTICS="shared", POPULATION="shared"))

dataloader.train.dataset.names, dataloader.test.dataset.names = "digits_train", "digits_val"
dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.train.mapper.use_instance_mask = False
for part in (dataloader.train, dataloader.test):
    part.mapper.augmentations[0] = L(T.ResizeShortestEdge)(
        short_edge_length=(48, 64), max_size=96, sample_style="choice"
    )
del part

optimizer.lr = 0.001
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[3, 4]), warmup_factor=0.1, warmup_length=0.5
)
train.update(max_iter=4, eval_period=0, seed=7)
train.checkpointer.period = 2

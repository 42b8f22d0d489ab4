"""Detectron2's norms, told to `bnext.layers.forms`: what each computes in evaluation mode.

What they do in training is their own; a conversion says that it is left out.
"""

from __future__ import annotations

import detectron2.layers.batch_norm
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from bnext.layers.build import LayerNorm2d
from bnext.layers.forms import register_form

register_form(FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)
register_form(NaiveSyncBatchNorm, nn.BatchNorm2d)
register_form(CycleBatchNormList, nn.ModuleList)

if hasattr(detectron2.layers.batch_norm, "LayerNorm"):  # detectron2 0.6 has none
    register_form(detectron2.layers.batch_norm.LayerNorm, LayerNorm2d)

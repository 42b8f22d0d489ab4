"""A backbone in the manner of detectron2's ViTDet: a net of one scale, a pyramid on its feature, norms by strings."""

from __future__ import annotations

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from torch import nn


class LayerNorm(nn.GroupNorm):
    """The "LN" that detectron2's main knows by name: over the channels of each position; here of each sample."""

    def __init__(self, channels):
        super().__init__(1, channels)


def make_norm(norm, channels):
    return LayerNorm(channels) if norm == "LN" else get_norm(norm, channels)


class PlainNet(nn.Module):
    """Patches of 16 pixels, and blocks with norms of their own."""

    def __init__(self, width, depth, norm_layer):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 16, stride=16)
        self.blocks = nn.ModuleList(nn.Sequential(norm_layer(width), nn.Linear(width, width)) for _ in range(depth))
        self.width = width

    def forward(self, image):
        feature = self.patch_embed(image).permute(0, 2, 3, 1)
        for block in self.blocks:
            feature = feature + block(feature)
        return feature.permute(0, 3, 1, 2)


class SimpleFeaturePyramid(Backbone):
    """Features p3, p4, p5 of a net with one feature of stride 16."""

    def __init__(self, net, out_channels, norm):
        super().__init__()
        self.net, self.scales = net, {"p3": 2.0, "p4": 1.0, "p5": 0.5}
        self._out_features = list(self.scales)
        self._out_feature_channels = dict.fromkeys(self.scales, out_channels)
        self._out_feature_strides = {name: int(16 / scale) for name, scale in self.scales.items()}
        for name in self.scales:
            norm_of_level = make_norm(norm, out_channels)
            conv = Conv2d(net.width, out_channels, 1, bias=norm_of_level is None, norm=norm_of_level)
            setattr(self, f"simfp_{name}", conv)

    def forward(self, image):
        feature = self.net(image)
        levels = {}
        for name, scale in self.scales.items():
            scaled = nn.functional.interpolate(feature, scale_factor=scale)
            levels[name] = getattr(self, f"simfp_{name}")(scaled)
        return levels

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def find_layer_decay(name, num_layers, decay):
    """The factor of a parameter's learning rate: the smaller the nearer it is to the image, as ViTDet has it."""
    layer = num_layers
    if ".patch_embed." in name:
        layer = 0
    elif ".blocks." in name:
        layer = int(name.partition(".blocks.")[2].partition(".")[0]) + 1
    return decay ** (num_layers - layer)


def list_decayed_params(model, lr_factor_func, base_lr):
    """Groups of parameters with the learning rate of their layer."""
    groups = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(base_lr * lr_factor_func(name), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

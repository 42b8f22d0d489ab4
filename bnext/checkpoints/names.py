"""Names that other libraries give to the weights of a ResNet, as detectron2 calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["TORCHVISION_INPUT", "rename_torchvision"]

# What the weights of torchvision and timm were trained with; detectron2's own ones with Caffe's.
TORCHVISION_INPUT: Mapping[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}

_FIRST = "layer1.0.conv1.weight"
_PARTS = (
    (re.compile(r"conv1\.(\w+)"), r"stem.conv1.\1"),
    (re.compile(r"bn1\.(\w+)"), r"stem.conv1.norm.\1"),
    (re.compile(r"layer(\d)\.(\d+)\.conv(\d)\.(\w+)"), r"res<\1>.\2.conv\3.\4"),
    (re.compile(r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)"), r"res<\1>.\2.conv\3.norm.\4"),
    (re.compile(r"layer(\d)\.(\d+)\.downsample\.0\.(\w+)"), r"res<\1>.\2.shortcut.\3"),
    (re.compile(r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)"), r"res<\1>.\2.shortcut.norm.\3"),
)


def rename_torchvision(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]] | None:
    """The ResNet of a state dict of torchvision or timm under detectron2's names.

    Args:
        state: of a classifier, or of a larger model that has one in it.

    Returns:
        The renamed entries, and the names of those that are left out, such as the classifier's; None: there is no such
        ResNet.

    Example:
        >>> rename_torchvision({"conv1.weight": 1, "layer1.0.conv1.weight": 2, "layer1.0.bn1.bias": 3, "fc.bias": 4})
        ({'stem.conv1.weight': 1, 'res2.0.conv1.weight': 2, 'res2.0.conv1.norm.bias': 3}, ['fc.bias'])
    """
    prefixes = [key[: -len(_FIRST)] for key in state if key == _FIRST or key.endswith(f".{_FIRST}")]
    if len(prefixes) != 1:
        return None

    renamed, left_out = {}, []
    for key, value in state.items():
        name = _rename(key[len(prefixes[0]) :]) if key.startswith(prefixes[0]) else None
        if name is None:
            left_out.append(key)
        else:
            renamed[name] = value
    return renamed, left_out


def _rename(name: str) -> str | None:
    for pattern, replacement in _PARTS:
        if pattern.fullmatch(name):
            renamed = pattern.sub(replacement, name)
            return re.sub(r"<(\d)>", lambda stage: str(int(stage[1]) + 1), renamed)
    return None

"""The only place where a norm is made: from a spec, or by one of detectron2's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnext.errors import check_choice
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.layers.walk import find_bnext_norms

__all__ = ["NAMED_NORMS", "NORM_NAMES", "LayerNorm2d", "build_norm", "make_named_norm", "name_norms"]

# detectron2's names of batch norms, as points of the one table.
NAMED_NORMS: dict[str, NormSpec] = {
    "BN": NormSpec(),
    "SyncBN": NormSpec(workers="all"),
    "FrozenBN": NormSpec(frozen="both"),
}
NORM_NAMES = (*NAMED_NORMS, "GN", "LN", "")


def build_norm(spec: NormSpec, levels: Sequence[str] | None = None) -> Callable[..., BatchNorm2d]:
    """A factory of norms, as detectron2's `get_norm` takes it: number of channels -> layer.

    It takes torch's `device` and `dtype` as well, which other libraries give.

    Args:
        spec: the norm.
        levels: names of the features that the norm will see in one call; None: it sees one feature map.

    Example:
        >>> build_norm(NormSpec(workers="all"))(8)
        BatchNorm2d(8, workers='all')
    """
    names = None if levels is None else tuple(levels)

    def make_norm(
        num_features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BatchNorm2d:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if names is None:
            return BatchNorm2d(num_features, spec, **place)
        return LevelBatchNorm2d(num_features, names, spec, **place)

    return make_norm


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of each position of [N, C, H, W], as detectron2's "LN".

    Source:
        Ba, Kiros and Hinton, *Layer Normalization*, 2016, in the form of Liu et al., *A ConvNet for the
        2020s*, 2022.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps=eps, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        last = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        output = last.permute(0, 3, 1, 2)
        return output.contiguous() if input.is_contiguous() else output


def make_named_norm(
    name: str,
    num_channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """A norm of one feature map by detectron2's name of it.

    Args:
        name: "BN", "SyncBN", "FrozenBN", "GN" (32 groups, or one per channel where there are fewer), "LN",
            or "" for none.
        num_channels: C.
        device, dtype: of its state, as torch's.

    Returns:
        The layer; None for "".

    Raises:
        ConfigError: another name.
    """
    check_choice("a norm", name, NORM_NAMES, where="make_named_norm")

    place: dict[str, Any] = {"device": device, "dtype": dtype}
    if name in NAMED_NORMS:
        return BatchNorm2d(num_channels, NAMED_NORMS[name], **place)
    if name == "GN":
        return nn.GroupNorm(min(32, num_channels), num_channels, **place)
    return LayerNorm2d(num_channels, **place) if name == "LN" else None


def name_norms(model: nn.Module) -> None:
    """Tell every norm of bnext its path in the model, so that its errors can name it."""
    for path, norm in find_bnext_norms(model).items():
        norm.path = path

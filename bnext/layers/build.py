"""The only place where a norm is made from a spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec, Workers

__all__ = ["BATCH_NORM_WORKERS", "build_norm", "name_norms"]

# detectron2's names for a batch norm -> who shares its mini-batch.
BATCH_NORM_WORKERS: dict[str, Workers] = {"BN": "one", "SyncBN": "all"}


def build_norm(spec: NormSpec, levels: Sequence[str]) -> Callable[[int], LevelBatchNorm2d]:
    """A factory of norms, as detectron2's `get_norm` takes it: number of channels -> layer.

    Args:
        spec: the norm.
        levels: names of the features that the norm will see.
    """
    names = tuple(levels)

    def make_norm(num_features: int) -> LevelBatchNorm2d:
        return LevelBatchNorm2d(num_features, names, spec)

    return make_norm


def name_norms(model: nn.Module) -> None:
    """Tell every norm of bnext its path in the model, so that its errors can name it."""
    for path, module in model.named_modules():
        if isinstance(module, LevelBatchNorm2d):
            module.path = path

"""The passes over several features, by a file that has them for one: each feature with vectors of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from bnext.kernels.formula import accumulation_dtype

__all__ = ["OneByOne", "Part", "is_one_part_each"]

Part = int | Tensor  # of all samples of a feature; or of each, [N]
Measure = Callable[[Tensor], tuple[Tensor, Tensor]]


class OneByOne:
    """See the functions of the same names in the folder's `__init__`.

    Args:
        file: with the passes over one feature, that is not empty.
    """

    def __init__(self, file: ModuleType) -> None:
        self.file = file

    def feature_statistics(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pairs = [self._measure(self.file.feature_statistics, x, x.shape[1:2]) for x in features]
        mean, var = map(torch.stack, zip(*pairs, strict=True))
        return mean, var

    def sample_statistics(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pairs = [self._measure(self.file.sample_statistics, x, x.shape[:2]) for x in features]
        if len(pairs) == 1:
            return pairs[0]
        mean, var = map(torch.cat, zip(*pairs, strict=True))
        return mean, var

    def _measure(self, measure: Measure, feature: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        if feature.numel():
            return measure(feature)
        zeros = torch.zeros(shape, dtype=accumulation_dtype(feature.dtype), device=feature.device)
        return zeros, zeros.clone()

    def scale_and_shift(
        self, features: Sequence[Tensor], parts: Sequence[Part], mean: Tensor, scale: Tensor, shift: Tensor
    ) -> list[Tensor]:
        outputs = []
        for x, p in zip(features, parts, strict=True):
            is_empty = x.numel() == 0
            outputs.append(x.clone() if is_empty else self.file.scale_and_shift(x, mean[p], scale[p], shift[p]))
        return outputs

    def backward_sums(
        self, features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], mean: Tensor
    ) -> Tensor:
        sums = []
        for x, dy, p in zip(features, grads, parts, strict=True):
            vectors = mean[p]
            is_empty = x.numel() == 0
            sums.append(vectors.new_zeros(2, *vectors.shape) if is_empty else self.file.backward_sums(x, dy, vectors))
        return _sum_parts(sums, parts, len(mean))

    def feature_gradients(
        self,
        features: Sequence[Tensor],
        grads: Sequence[Tensor],
        parts: Sequence[Part],
        mean: Tensor,
        scale: Tensor,
        slope: Tensor,
        offset: Tensor,
    ) -> list[Tensor]:
        gradients = []
        for x, dy, p in zip(features, grads, parts, strict=True):
            vectors = mean[p], scale[p], slope[p], offset[p]
            gradients.append(self.file.feature_gradient(x, dy, *vectors) if x.numel() else x.clone())
        return gradients


def _sum_parts(sums: Sequence[Tensor], parts: Sequence[Part], num_parts: int) -> Tensor:
    """Add up vectors of features, [2, C], or of their samples, [2, N, C], by the parts they belong to: [2, P, C]."""
    if is_one_part_each(parts, num_parts):
        return torch.stack(list(sums), dim=1)

    total = sums[0].new_zeros(2, num_parts, sums[0].shape[-1])
    for vectors, part in zip(sums, parts, strict=True):
        if isinstance(part, Tensor):
            total.index_add_(1, part, vectors)
        else:
            total[:, part].add_(vectors)
    return total


def is_one_part_each(parts: Sequence[Part], num_parts: int) -> bool:
    """Whether the features are the parts, one after another."""
    return all(isinstance(part, int) for part in parts) and tuple(parts) == tuple(range(num_parts))

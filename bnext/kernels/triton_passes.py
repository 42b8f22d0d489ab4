"""The passes in Triton: all features of a call in one launch each way, whatever their sizes.

    pass                 launches
    feature_statistics   2: moments of tiles, merged by Chan's formula
    sample_statistics    2; 1 where every sample is one tile, as a RoI is
    scale_and_shift      1
    backward_sums        2: sums of tiles, added up always in the same order
    feature_gradients    1
    group_statistics     1
    group_sums           1

Nothing is copied to the device, nothing is waited for, and no two programs add to the same number, so that results do
not change from run to run. A launch takes up to 8 features of one type that lie alike, NCHW or channels_last; others
have one of their own. A feature whose positions have no common stride is copied first, and a gradient that does not lie
as its feature does.

For GPUs that Triton compiles for, and for its interpreter on a CPU. Triton is imported when its kernels are chosen,
never with the package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext.kernels.formula import accumulation_dtype
from bnext.kernels.one_by_one import OneByOne, Part
from bnext.kernels.triton_plan import Form, Launch, order_dimensions, plan_launches

__all__ = ["TritonPasses", "is_triton_installed"]

# Elements of a feature from which on Triton is taken, for a measurement on a GPU to set: none was at hand.
_FEWEST = 0
_MERGED = {"BLOCK_T": 32, "BLOCK_C": 32}  # tiles and channels that are merged at once


class Views(NamedTuple):
    """Tensors of a launch as [N, C, P], one for each feature; for the rest see `Strides`."""

    tensors: tuple[Tensor, ...]
    sample_stride: tuple[int, ...]
    outer_stride: tuple[int, ...]


def is_triton_installed() -> bool:
    """Whether there is a Triton whose kernels take tuples."""
    if importlib.util.find_spec("triton") is None:
        return False
    return hasattr(importlib.import_module("triton.language"), "tuple")


class TritonPasses(OneByOne):
    """See the functions of the same names in the folder's `__init__`.

    Args:
        file: with torch's passes on the same device, see `OneByOne`.
    """

    def takes(self, feature: Tensor) -> bool:
        """Whether features like this one are for Triton: on a GPU, or in its interpreter."""
        is_on_device = feature.device.type == "cuda" or _load_kernels().is_interpreted
        return is_on_device and feature.numel() >= _FEWEST

    def feature_statistics(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(features[0]):
            return _measure(features, range(len(features)), len(features), are_cut=False)

    def sample_statistics(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        *first_rows, num_rows = accumulate((len(x) for x in features), initial=0)
        with torch.cuda.device_of(features[0]):
            return _measure(features, first_rows, num_rows, are_cut=True)

    def scale_and_shift(
        self, features: Sequence[Tensor], parts: Sequence[Part], mean: Tensor, scale: Tensor, shift: Tensor
    ) -> list[Tensor]:
        with torch.cuda.device_of(features[0]):
            return _transform(features, features, parts, [mean, scale, shift])

    def backward_sums(
        self, features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], mean: Tensor
    ) -> Tensor:
        with torch.cuda.device_of(features[0]):
            return _sum(features, grads, parts, mean)

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
        with torch.cuda.device_of(features[0]):
            return _transform(features, grads, parts, [mean, slope, offset, scale])

    def group_statistics(
        self, count: Tensor, mean: Tensor, var: Tensor, groups: Tensor, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(mean):
            parts = count.contiguous(), mean.contiguous(), var.contiguous()
            return _merge_statistics(*parts, groups.contiguous(), num_groups)

    def group_sums(self, sums: Tensor, groups: Tensor, num_groups: int) -> Tensor:
        with torch.cuda.device_of(sums):
            return _merge_sums(sums.contiguous(), groups.contiguous(), num_groups)


def _measure(
    features: Sequence[Tensor], first_rows: Iterable[int], num_rows: int, are_cut: bool
) -> tuple[Tensor, Tensor]:
    """Mean and variance, [R, C]: a row for each feature, or for each sample where they are cut."""
    num_channels = features[0].shape[1]
    launches = plan_launches((_describe(features),), tuple(first_rows), (are_cut,) * len(features))
    num_tiles = launches[-1].end if launches else 0

    mean = features[0].new_empty(num_tiles, num_channels, dtype=accumulation_dtype(features[0].dtype))
    var, counts = torch.empty_like(mean), mean.new_empty(num_tiles)
    rows = mean.new_empty(num_tiles, dtype=torch.int32)
    for launch in launches:
        arguments = _view(features, launch, 0), mean, var, rows, counts, launch.steps, num_channels
        _start("take_statistics", launch.num_programs, launch.table, *arguments, **launch.constants)

    members = [index for launch in launches for index in launch.members]
    if num_tiles == num_rows and members == list(range(len(features))):  # the tiles are the rows, in their order
        return mean, var

    _, mean, var = _merge_statistics(counts, mean, var, rows, num_rows)
    return mean, var


def _merge_statistics(
    counts: Tensor, mean: Tensor, var: Tensor, rows: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge those of T tiles, [T] and [T, C], into those of the rows that they belong to, [R] and [R, C]."""
    num_tiles, num_channels = mean.shape
    merged = counts.new_empty(num_rows), mean.new_empty(num_rows, num_channels), mean.new_empty(num_rows, num_channels)
    row_counts, means, variances = merged
    tiles = mean, var, rows, counts
    _merge("merge_statistics", num_rows, *tiles, means, variances, row_counts, num_tiles, num_channels)
    return merged


def _sum(features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean), [2, P, C]."""
    num_parts, num_channels = mean.shape
    launches = plan_launches((_describe(features), _describe(grads)), *_describe_parts(parts))
    num_tiles = launches[-1].end if launches else 0

    mean = _make_rows(mean)
    sums = mean.new_empty(2, num_tiles, num_channels)
    tile_parts = mean.new_empty(num_tiles, dtype=torch.int32)
    for launch in launches:
        x, dy, indices = _view(features, launch, 0), _view(grads, launch, 1), _take_indices(parts, launch)
        arguments = x, dy, indices, mean, mean.stride(0), *sums, tile_parts, launch.steps, num_channels
        _start("sum_tiles", launch.num_programs, launch.table, *arguments, **launch.constants)

    return _merge_sums(sums, tile_parts, num_parts)


def _merge_sums(sums: Tensor, parts: Tensor, num_parts: int) -> Tensor:
    """Add up those of T tiles, [2, T, C], by the parts that they belong to, [T]: [2, P, C]."""
    _, num_tiles, num_channels = sums.shape
    totals = sums.new_empty(2, num_parts, num_channels)
    _merge("merge_sums", num_parts, *sums, parts, *totals, num_tiles, num_channels)
    return totals


def _transform(
    features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """scale * (x - mean) + shift, and + factor * dy if there is one; vectors: mean, scale, shift, factor, [P, C]."""
    launches = plan_launches((_describe(features), _describe(grads)), *_describe_parts(parts), has_outputs=True)
    rows = tuple(map(_make_rows, vectors))
    strides = tuple(vector.stride(0) for vector in rows)

    outputs = [torch.empty_like(x) if x.numel() == 0 else x for x in features]
    for launch in launches:
        for index in launch.members:
            outputs[index] = _new_like(features[index], launch.is_planes)
        x, dy, y = _view(features, launch, 0), _view(grads, launch, 1), _view(outputs, launch, 2)
        arguments = x, dy, y, _take_indices(parts, launch), rows, strides, rows[0].shape[1]
        constants = launch.constants | {"HAS_GRADS": len(vectors) == 4}
        _start("transform", launch.num_programs, launch.table, *arguments, **constants)

    return outputs


def _merge(kernel: str, num_rows: int, *arguments: Any) -> None:
    """Merge tiles, whose last argument is the number of channels."""
    blocks = -(-arguments[-1] // _MERGED["BLOCK_C"])
    _start(kernel, num_rows * blocks, *arguments, **_MERGED)


def _start(kernel: str, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, one program for each tile and block of channels."""
    if num_programs:
        getattr(_load_kernels(), kernel)[(num_programs,)](*arguments, **constants)


def _load_kernels() -> ModuleType:
    from bnext.kernels import triton_kernels

    return triton_kernels


# ---- arguments


def _describe(tensors: Sequence[Tensor]) -> tuple[Form, ...]:
    return tuple(Form(x.shape, x.stride(), x.dtype) for x in tensors)


def _describe_parts(parts: Sequence[Part]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Owners of features, and whether their samples have one each."""
    owners = tuple(part if isinstance(part, int) else -1 for part in parts)
    return owners, tuple(owner == -1 for owner in owners)


def _take_indices(parts: Sequence[Part], launch: Launch) -> tuple[Tensor, ...]:
    """For each feature of a launch the parts of its samples; nothing, where every feature is one part."""
    chosen = [parts[index] for index in launch.members]
    indices = [part.contiguous() for part in chosen if isinstance(part, Tensor)]
    if len(indices) in (0, len(chosen)):
        return tuple(indices)
    return tuple(part.contiguous() if isinstance(part, Tensor) else indices[0] for part in chosen)  # an int is not read


def _view(tensors: Sequence[Tensor], launch: Launch, role: int) -> Views:
    """Tensors of a launch: 0 features, 1 their gradients, 2 outputs."""
    chosen = [tensors[index] for index in launch.members]
    if role < 2 and any(launch.are_copied[role]):
        pairs = zip(chosen, launch.are_copied[role], strict=True)
        chosen = [_new_like(x, launch.is_planes).copy_(x) if is_copied else x for x, is_copied in pairs]
    return Views(tuple(chosen), *launch.strides[role])


def _new_like(feature: Tensor, is_planes: bool) -> Tensor:
    """A contiguous feature, or one in channels_last."""
    order = order_dimensions(feature.dim(), is_planes)
    return torch.empty_permuted(feature.shape, order, dtype=feature.dtype, device=feature.device)


def _make_rows(vectors: Tensor) -> Tensor:
    """[P, C] whose channels are neighbours; a shared affine may have one row for all parts."""
    return vectors if vectors.stride(1) == 1 or vectors.shape[1] == 1 else vectors.contiguous()

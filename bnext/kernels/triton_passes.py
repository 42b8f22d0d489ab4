"""The passes in Triton: all features of a call in one launch each way, whatever their sizes.

    pass                 launches
    feature_statistics   2: moments of tiles, merged by Chan's formula
    sample_statistics    2; 1 where every sample is one tile, as a RoI is
    scale_and_shift      1
    backward_sums        2: sums of tiles, added up in their order
    feature_gradients    1

Nothing is copied to the device, nothing is waited for, and no two programs add to the same number, so that results do
not change from run to run. A launch takes up to 8 features of one type, all in planes or all in rows (the words are
those of triton_kernels.py); others have a launch of their own. A feature whose positions have no common stride is
copied first, as is a gradient that does not lie as its feature does.

For GPUs that Triton compiles for, and for its interpreter on a CPU. Triton itself is imported at the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext.kernels.formula import accumulation_dtype
from bnext.kernels.one_by_one import Part

__all__ = ["TritonPasses"]

_MOST_FEATURES = 8  # of a launch: a detector has 5 levels, and the arguments of a kernel must fit into 4 KB
_NUM_PROGRAMS = 2048  # that share the statistics of a launch: about 16 for each multiprocessor of a large GPU
_ELEMENTS = 2048  # of a slab: 16 for each thread of 4 warps, so that nothing spills
_LONGEST = 512  # positions of a slab in planes
_WIDEST = 64  # channels of a slab in rows, where there are many positions
_WIDEST_LOAD = 16  # bytes
_MERGED = {"BLOCK_T": 32, "BLOCK_C": 32}  # of a block of tiles


class Table(NamedTuple):
    """Numbers of the features of a launch, each a tuple of codes, see `_encode`."""

    first_tile: tuple[int, ...]
    slabs: tuple[int, ...]  # of a stretch
    sample_slabs: tuple[int, ...]  # of a sample
    positions: tuple[int, ...]  # of a sample
    owner: tuple[int, ...]  # of the first stretch: its row of statistics, or its part; -1: a tensor has the parts
    is_aligned: tuple[int, ...]  # 1: sizes and strides allow the widest loads


class Views(NamedTuple):
    """Tensors of a launch as [N, C, P], one for each feature; their inner stride is 1."""

    tensors: tuple[Tensor, ...]
    sample_stride: tuple[int, ...]
    outer_stride: tuple[int, ...]  # of channels in planes, of positions in rows


class _Launch(NamedTuple):
    """Features of one type and layout, as arguments of a kernel."""

    table: Table
    views: list[Views]  # of the features, of their gradients ...
    steps: int  # slabs of a tile
    next_tile: int  # the first of the next launch
    num_programs: int
    constants: dict[str, int]


class TritonPasses:
    """See the functions of the same names in the folder's `__init__`."""

    def feature_statistics(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return _measure(features, range(len(features) + 1), per_sample=False)

    def sample_statistics(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rows = [0, *accumulate(len(x) for x in features)]
        return _measure(features, rows, per_sample=True)

    def scale_and_shift(
        self, features: Sequence[Tensor], parts: Sequence[Part], mean: Tensor, scale: Tensor, shift: Tensor
    ) -> list[Tensor]:
        return _transform(features, None, parts, [mean, scale, shift])

    def backward_sums(
        self, features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], mean: Tensor
    ) -> Tensor:
        mean = _make_rows(mean)
        num_parts, num_channels = mean.shape

        launches: list[_Launch] = []
        indices = []
        for members, is_planes in _group(features):
            x, dy = _lay_out(features, members, is_planes), _lay_out(grads, members, is_planes)
            some_parts = [parts[index] for index in members]
            launches.append(_plan([x, dy], some_parts, is_planes, first_tile=_next_tile(launches)))
            indices.append(_make_indices(some_parts))

        num_tiles = _next_tile(launches)
        sums = mean.new_empty(2, num_tiles, num_channels)
        tile_parts = mean.new_empty(num_tiles, dtype=torch.int32)
        for launch, index in zip(launches, indices, strict=True):
            arguments = *launch.views, index, mean, mean.stride(0), *sums, tile_parts, launch.steps, num_channels
            _start("sum_tiles", launch.num_programs, launch.table, *arguments, **launch.constants)

        totals = mean.new_empty(2, num_parts, num_channels)
        _merge("merge_sums", num_parts, *sums, tile_parts, *totals, num_tiles, num_channels)
        return totals

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
        return _transform(features, grads, parts, [mean, slope, offset, scale])


def _measure(features: Sequence[Tensor], rows: Sequence[int], per_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance, [R, C]; `rows` are the first of each feature, and R at the end."""
    num_channels, num_rows = features[0].shape[1], rows[-1]

    launches: list[_Launch] = []
    for members, is_planes in _group(features):
        x = _lay_out(features, members, is_planes)
        owners = [rows[index] for index in members]
        launches.append(_plan([x], owners, is_planes, first_tile=_next_tile(launches), per_sample=per_sample))

    num_tiles = _next_tile(launches)
    mean = features[0].new_empty(num_tiles, num_channels, dtype=accumulation_dtype(features[0].dtype))
    var, counts = torch.empty_like(mean), mean.new_empty(num_tiles)
    owners_of_tiles = mean.new_empty(num_tiles, dtype=torch.int32)
    for launch in launches:
        arguments = *launch.views, mean, var, owners_of_tiles, counts, launch.steps, num_channels
        _start("take_statistics", launch.num_programs, launch.table, *arguments, **launch.constants)

    if num_tiles == num_rows and all(x.numel() for x in features):  # every row is a tile
        return mean, var

    merged_mean, merged_var = (mean.new_empty(num_rows, num_channels) for _ in range(2))
    tiles = mean, var, owners_of_tiles, counts
    _merge("merge_statistics", num_rows, *tiles, merged_mean, merged_var, num_tiles, num_channels)
    return merged_mean, merged_var


def _transform(
    features: Sequence[Tensor], grads: Sequence[Tensor] | None, parts: Sequence[Part], vectors: list[Tensor]
) -> list[Tensor]:
    """scale * (x - mean) + shift, and + factor * dy; the vectors are mean, scale, shift and factor, [P, C]."""
    rows = tuple(_make_rows(vector) for vector in vectors)
    strides = tuple(vector.stride(0) for vector in rows)
    outputs = [torch.empty_like(x) if x.numel() == 0 else x for x in features]

    for members, is_planes in _group(features):
        x = _lay_out(features, members, is_planes)
        dy = x if grads is None else _lay_out(grads, members, is_planes)
        y = [_new_like(feature, is_planes) for feature in x]
        some_parts = [parts[index] for index in members]
        launch = _plan([x, dy, y], some_parts, is_planes, num_programs=None)

        arguments = *launch.views, _make_indices(some_parts), rows, strides, x[0].shape[1]
        has_grads = grads is not None
        _start("transform", launch.num_programs, launch.table, *arguments, **launch.constants, HAS_GRADS=has_grads)
        for index, output in zip(members, y, strict=True):
            outputs[index] = output

    return outputs


# ---- how features lie


def _group(features: Sequence[Tensor]) -> list[tuple[list[int], bool]]:
    """Features that have elements, sorted into launches; and whether those of a launch are taken as planes."""
    groups: dict[tuple[torch.dtype, bool], list[int]] = {}
    present = [index for index, x in enumerate(features) if x.numel()]
    can_all_be_rows = all(_has_rows(features[index]) for index in present)
    for index in present:
        x = features[index]
        is_planes = not can_all_be_rows and (_has_planes(x) or not _has_rows(x))
        groups.setdefault((x.dtype, is_planes), []).append(index)

    launches = []
    for (_, is_planes), members in groups.items():
        for start in range(0, len(members), _MOST_FEATURES):
            launches.append((members[start : start + _MOST_FEATURES], is_planes))
    return launches


def _position_stride(feature: Tensor) -> int | None:
    """The stride of all positions of [N, C, ...] as one dimension; None: they have no common one."""
    dims = zip(feature.shape[2:], feature.stride()[2:], strict=True)
    dims = [(size, stride) for size, stride in dims if size > 1]
    if not dims:
        return 1
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != size * inner:
            return None
    return dims[-1][1]


def _has_planes(feature: Tensor) -> bool:
    return _position_stride(feature) == 1


def _has_rows(feature: Tensor) -> bool:
    """Whether the channels of a position are neighbours; the positions may have no common stride."""
    return feature.stride(1) == 1 or feature.shape[1] == 1


def _lay_out(tensors: Sequence[Tensor], members: Sequence[int], is_planes: bool) -> list[Tensor]:
    """Those of a launch, copied where they lie otherwise."""
    chosen = []
    for index in members:
        x = tensors[index]
        fits = _has_planes(x) if is_planes else _has_rows(x) and _position_stride(x) is not None
        chosen.append(x if fits else _new_like(x, is_planes).copy_(x))
    return chosen


def _new_like(feature: Tensor, is_planes: bool) -> Tensor:
    """A contiguous feature, or one in channels_last."""
    if is_planes:
        return feature.new_empty(feature.shape)
    order = (0, *range(2, feature.dim()), 1)
    return torch.empty_permuted(feature.shape, order, dtype=feature.dtype, device=feature.device)


def _make_rows(vectors: Tensor) -> Tensor:
    """[P, C] whose channels are neighbours; a shared affine has one row for all."""
    return vectors if vectors.stride(1) == 1 or vectors.shape[1] == 1 else vectors.contiguous()


# ---- launches


def _plan(
    tensors: Sequence[Sequence[Tensor]],
    owners: Sequence[Part],
    is_planes: bool,
    *,
    first_tile: int = 0,
    per_sample: bool = False,
    num_programs: int | None = _NUM_PROGRAMS,
) -> _Launch:
    """Cut features into tiles.

    Args:
        tensors: the features of a launch, their gradients ..., as they are laid out.
        owners: for each feature that of all its samples, or a tensor with that of each.
        is_planes: how they lie.
        first_tile: its number.
        per_sample: whether samples have owners that follow one another.
        num_programs: about how many share the work; None: a tile is one slab.
    """
    num_channels = tensors[0][0].shape[1]
    are_cut = [per_sample or isinstance(owner, Tensor) for owner in owners]  # no tile has slabs of two samples
    shapes = [_view(xs, is_planes, is_cut) for *xs, is_cut in zip(*tensors, are_cut, strict=True)]
    block_c, block_p = _choose_block(num_channels, max(shape.positions for shape in shapes), is_planes)
    blocks = -(-num_channels // block_c)

    sample_slabs = [-(-shape.positions // block_p) for shape in shapes]
    num_slabs = sum(shape.samples * number for shape, number in zip(shapes, sample_slabs, strict=True))
    steps = 1 if num_programs is None else max(1, num_slabs * blocks // num_programs)

    vector = max(1, _WIDEST_LOAD // tensors[0][0].element_size())
    numbers = []
    tile = first_tile
    for shape, of_sample, is_cut, owner in zip(shapes, sample_slabs, are_cut, owners, strict=True):
        slabs = of_sample if is_cut else shape.samples * of_sample
        inner = shape.positions if is_planes else num_channels
        is_aligned = all(number % vector == 0 for number in (inner, *shape.sample_strides, *shape.outer_strides))
        owner = -1 if isinstance(owner, Tensor) else owner
        numbers.append((tile, slabs, of_sample, shape.positions, owner, int(is_aligned)))
        tile += -(-slabs // steps) * (shape.samples if is_cut else 1)

    table = Table(*(tuple(map(_encode, column)) for column in zip(*numbers, strict=True)))
    views = []
    for role, xs in enumerate(tensors):
        sample_strides = tuple(_encode(shape.sample_strides[role]) for shape in shapes)
        outer_strides = tuple(_encode(shape.outer_strides[role]) for shape in shapes)
        views.append(Views(tuple(xs), sample_strides, outer_strides))

    are_aligned = {number[-1] for number in numbers}
    constants = {
        "AXIS": int(is_planes),
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "VECTOR": vector if 1 in are_aligned else 1,
        "IS_MIXED": len(are_aligned) > 1,
        "IS_HUGE": max(max(shape.outer_strides) for shape in shapes) * max(block_c, block_p) >= 2**31,
        "num_warps": min(8, max(1, block_c * block_p // (512 if 1 in are_aligned else 256))),
    }
    return _Launch(table, views, steps, tile, (tile - first_tile) * blocks, constants)


class _Shape(NamedTuple):
    """A feature as samples of positions; its strides, those of its gradient ..."""

    samples: int
    positions: int
    sample_strides: list[int]
    outer_strides: list[int]


def _view(tensors: Sequence[Tensor], is_planes: bool, is_cut: bool) -> _Shape:
    """See `_Shape`; in rows, samples that are not cut are one sample with the positions of all, where strides allow."""
    samples, positions = len(tensors[0]), math.prod(tensors[0].shape[2:])
    sample_strides = [x.stride(0) if samples > 1 else 0 for x in tensors]
    position_strides = [_position_stride(x) or 0 for x in tensors]
    if is_planes:
        return _Shape(samples, positions, sample_strides, [x.stride(1) for x in tensors])

    if not is_cut and positions == 1:
        return _Shape(1, samples, [0] * len(tensors), sample_strides)
    pairs = zip(sample_strides, position_strides, strict=True)
    if not is_cut and all(of_sample == positions * of_position for of_sample, of_position in pairs):
        return _Shape(1, samples * positions, [0] * len(tensors), position_strides)
    return _Shape(samples, positions, sample_strides, position_strides)


def _choose_block(num_channels: int, most_positions: int, is_planes: bool) -> tuple[int, int]:
    """Channels and positions of a slab: long along the neighbours, so that loads are wide and together."""
    channels, positions = _power_of_2(num_channels), _power_of_2(most_positions)
    block_p = min(positions, _LONGEST if is_planes else _ELEMENTS // min(channels, _WIDEST))
    return min(channels, _ELEMENTS // block_p), block_p


def _power_of_2(number: int) -> int:
    """The next one: Triton's blocks have such sizes."""
    return 1 << (number - 1).bit_length()


def _encode(number: int) -> int:
    """An odd number above 1, for a number from -1 on.

    Triton compiles a kernel anew where a number is 1 or divisible by 16, and the sizes of a detector's features change
    with every batch.
    """
    return 2 * number + 5


def _next_tile(launches: Sequence[_Launch]) -> int:
    return launches[-1].next_tile if launches else 0


def _make_indices(parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Parts of samples, a tensor for each feature; those of features that are one part are not read."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return ()
    return tuple(part.contiguous() if isinstance(part, Tensor) else tensors[0] for part in parts)


def _merge(kernel: str, num_rows: int, *arguments: Any) -> None:
    """Merge tiles: their number and that of channels come last."""
    blocks = -(-arguments[-1] // _MERGED["BLOCK_C"])
    _start(kernel, num_rows * blocks, *arguments, **_MERGED)


def _start(kernel: str, num_programs: int, *arguments: Any, **constants: int) -> None:
    """Launch a kernel on the device of its tensors."""
    from bnext.kernels import triton_kernels

    if num_programs:
        getattr(triton_kernels, kernel)[(num_programs,)](*arguments, **constants)

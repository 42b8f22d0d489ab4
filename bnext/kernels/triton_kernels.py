"""The kernels that triton_passes.py launches. One launch has all features; each program works on a tile of one of them.

A tile is a block of channels of one or several slabs; a slab is up to BLOCK_P positions of one sample. Slabs that share
statistics or vectors are a stretch: those of a whole feature, or of one sample. A feature lies in planes, where the
positions of a channel are neighbours (NCHW, AXIS 1), or in rows, where the channels of a position are (channels_last,
AXIS 0). AXIS is the dimension of the positions in a block; neighbours are along its last dimension.

Features come as a `Table` and `Views`, see triton_plan.py and triton_passes.py, their numbers as codes.

Shape letters: C channels, P parts, R rows of statistics, T tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["is_interpreted", "merge_statistics", "merge_sums", "sum_tiles", "take_statistics", "transform"]


# ---- the tile of a program


@triton.jit
def _decode(code: tl.tensor) -> tl.tensor:
    return (code >> 1) - 2


@triton.jit
def _find_tile(table: tl.tuple, steps: tl.tensor, blocks: tl.tensor) -> tl.tuple:
    """The tile of this program, its stretch, its slabs there, and the numbers of its feature."""
    tile = tl.program_id(0) // blocks + _decode(table.first_tile[0])

    first_tile, slabs, sample_slabs = table.first_tile[0], table.slabs[0], table.sample_slabs[0]
    positions, owner, is_aligned = table.positions[0], table.owner[0], table.is_aligned[0]
    for index in tl.static_range(1, len(table.slabs)):
        is_here = tile >= (table.first_tile[index] >> 1) - 2  # not `_decode`: a call takes long in the interpreter
        first_tile = tl.where(is_here, table.first_tile[index], first_tile)
        slabs = tl.where(is_here, table.slabs[index], slabs)
        sample_slabs = tl.where(is_here, table.sample_slabs[index], sample_slabs)
        positions = tl.where(is_here, table.positions[index], positions)
        owner = tl.where(is_here, table.owner[index], owner)
        is_aligned = tl.where(is_here, table.is_aligned[index], is_aligned)

    slabs = _decode(slabs)
    tiles = (slabs + steps - 1) // steps  # of a stretch
    place = tile - _decode(first_tile)
    first_slab = place % tiles * steps
    end = tl.minimum(first_slab + steps, slabs)

    numbers = _decode(sample_slabs), _decode(positions), _decode(owner), _decode(is_aligned)
    return tile, place // tiles, first_slab, end, numbers


@triton.jit
def _find_view(views: tl.tuple, table: tl.tuple, tile: tl.tensor) -> tl.tuple:
    """Pointer and strides of the feature that has a tile."""
    tensor, sample_stride, outer_stride = views.tensors[0], views.sample_stride[0], views.outer_stride[0]
    for index in tl.static_range(1, len(views.tensors)):
        is_here = tile >= (table.first_tile[index] >> 1) - 2
        tensor = tl.where(is_here, views.tensors[index], tensor)
        sample_stride = tl.where(is_here, views.sample_stride[index], sample_stride)
        outer_stride = tl.where(is_here, views.outer_stride[index], outer_stride)
    return tensor, _decode(sample_stride), _decode(outer_stride)


@triton.jit
def _find_part(indices: tl.tuple, table: tl.tuple, tile: tl.tensor, stretch: tl.tensor, owner: tl.tensor) -> tl.tensor:
    """The part of a stretch: that of the feature, or of the sample that the stretch is."""
    if len(indices) == 0:
        part = owner.to(tl.int64)
    else:
        index_of_samples = indices[0]
        for index in tl.static_range(1, len(indices)):
            is_here = tile >= (table.first_tile[index] >> 1) - 2
            index_of_samples = tl.where(is_here, indices[index], index_of_samples)
        part = tl.load(index_of_samples + stretch, mask=owner < 0, other=owner).to(tl.int64)
    return part


@triton.jit
def _find_slab(
    slab: tl.tensor,
    place: tl.tuple,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tuple:
    """Sample and first position of a slab, how many positions it has, and which elements of its block exist."""
    stretch, sample_slabs, positions, first_channel, C = place
    sample = stretch + slab // sample_slabs
    first = (slab % sample_slabs).to(positions.dtype) * BLOCK_P

    # Of an aligned feature this changes no number; it tells the compiler that neighbours exist together.
    if AXIS == 1:
        last_position, last_channel = positions // VECTOR * VECTOR, C
    else:
        last_position, last_channel = positions, C // VECTOR * VECTOR

    is_position = first + tl.arange(0, BLOCK_P) < last_position
    is_channel = first_channel + tl.arange(0, BLOCK_C) < last_channel
    mask = tl.expand_dims(is_position, 1 - AXIS) & tl.expand_dims(is_channel, AXIS)
    return sample, first, tl.minimum(positions - first, BLOCK_P), mask


@triton.jit
def _find_elements(
    view: tl.tuple,
    sample: tl.tensor,
    position: tl.tensor,
    channel: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_HUGE: tl.constexpr,
) -> tl.tensor:
    """Pointers to a block. Its start takes 64 bits; within it 32 do, unless the feature is huge."""
    tensor, sample_stride, outer_stride = view
    outer_stride = outer_stride // VECTOR * VECTOR
    tensor += sample.to(tl.int64) * (sample_stride // VECTOR * VECTOR)

    if AXIS == 1:
        tensor += channel.to(tl.int64) * outer_stride + position
        outer, inner = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    else:
        tensor += position.to(tl.int64) * outer_stride + channel
        outer, inner = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)

    if IS_HUGE:
        outer = outer.to(tl.int64)
    else:
        outer_stride = outer_stride.to(tl.int32)
    return tensor + (outer * outer_stride)[:, None] + inner[None, :]


# ---- statistics


@triton.jit
def _merge(
    count: tl.tensor, mean: tl.tensor, var: tl.tensor, new_count: tl.tensor, new_mean: tl.tensor, new_var: tl.tensor
) -> tl.tuple:
    """Chan's formula for two: the moments of their union, variances with correction 0."""
    total = count + new_count
    weight = new_count / tl.maximum(total, 1)

    change = new_mean - mean
    mean += weight * change
    var += weight * (new_var - var) + change * (change * (weight * (1 - weight)))
    return total, mean, var


@triton.jit(do_not_specialize=["steps"])
def take_statistics(
    table: tl.tuple,
    xs: tl.tuple,
    means: tl.tensor,
    variances: tl.tensor,
    owners: tl.tensor,
    counts: tl.tensor,
    steps: tl.tensor,
    C: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_MIXED: tl.constexpr,
    IS_HUGE: tl.constexpr,
) -> None:
    """Mean and variance of each tile, [T, C]; the row that it belongs to and its elements per channel, [T]."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    tile, stretch, first_slab, end, numbers = _find_tile(table, steps, blocks)
    sample_slabs, positions, owner, is_aligned = numbers
    x = _find_view(xs, table, tile)
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    place = stretch, sample_slabs, positions, first_channel, C

    like = tl.zeros([BLOCK_C], means.dtype.element_ty)
    if IS_MIXED and is_aligned == 0:
        count, mean, var = _measure(x, place, first_slab, end, like, AXIS, BLOCK_C, BLOCK_P, 1, IS_HUGE)
    else:
        count, mean, var = _measure(x, place, first_slab, end, like, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)

    tl.store(owners + tile, owner + stretch)
    tl.store(counts + tile, count)
    channels = first_channel + tl.arange(0, BLOCK_C)
    tl.store(means + tile.to(tl.int64) * C + channels, mean, mask=channels < C)
    tl.store(variances + tile.to(tl.int64) * C + channels, var, mask=channels < C)


@triton.jit
def _measure(
    x: tl.tuple,
    place: tl.tuple,
    first_slab: tl.tensor,
    end: tl.tensor,
    zeros: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_HUGE: tl.constexpr,
) -> tl.tuple:
    """Moments of a tile: each slab is read once and gone through twice, and slabs are merged."""
    channel = place[3]
    count, mean, var = (end * 0).to(zeros.dtype), zeros, zeros
    for slab in range(first_slab, end):
        sample, position, number, mask = _find_slab(slab, place, AXIS, BLOCK_C, BLOCK_P, VECTOR)
        elements = _find_elements(x, sample, position, channel, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)
        values = tl.load(elements, mask=mask, other=0).to(zeros.dtype)

        slab_count = number.to(zeros.dtype)
        slab_mean = tl.sum(values, AXIS) / slab_count
        centered = tl.where(mask, values - tl.expand_dims(slab_mean, AXIS), 0)
        slab_var = tl.sum(centered * centered, AXIS) / slab_count
        count, mean, var = _merge(count, mean, var, slab_count, slab_mean, slab_var)

    return count, mean, var


@triton.jit(do_not_specialize=["num_tiles"])
def merge_statistics(
    tile_means: tl.tensor,
    tile_variances: tl.tensor,
    owners: tl.tensor,
    counts: tl.tensor,
    means: tl.tensor,
    variances: tl.tensor,
    row_counts: tl.tensor,
    num_tiles: tl.tensor,
    C: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """Mean and variance of each row, [R, C], from those of its tiles, and its count, [R]; 0 where it has none."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)

    zeros = tl.zeros([BLOCK_C], means.dtype.element_ty)
    count, mean, var = (num_tiles * 0).to(zeros.dtype), zeros, zeros
    for first in range(0, num_tiles, BLOCK_T):
        tiles = first + tl.arange(0, BLOCK_T)
        is_here = tl.load(owners + tiles, mask=tiles < num_tiles, other=-1) == row
        mask = is_here[:, None] & (channels < C)[None, :]
        vectors = tiles.to(tl.int64)[:, None] * C + channels[None, :]
        tile_mean = tl.load(tile_means + vectors, mask=mask, other=0)
        tile_var = tl.load(tile_variances + vectors, mask=mask, other=0)
        tile_count = tl.load(counts + tiles, mask=is_here, other=0)

        new_count = tl.sum(tile_count, 0)
        weight = (tile_count / tl.maximum(new_count, 1))[:, None]
        new_mean = tl.sum(weight * tile_mean, 0)
        centered = tl.where(mask, tile_mean - new_mean[None, :], 0)
        new_var = tl.sum(weight * (tile_var + centered * centered), 0)
        count, mean, var = _merge(count, mean, var, new_count, new_mean, new_var)

    tl.store(row_counts + row, count)
    tl.store(means + row.to(tl.int64) * C + channels, mean, mask=channels < C)
    tl.store(variances + row.to(tl.int64) * C + channels, var, mask=channels < C)


# ---- sums of the backward


@triton.jit(do_not_specialize=["steps"])
def sum_tiles(
    table: tl.tuple,
    xs: tl.tuple,
    dys: tl.tuple,
    indices: tl.tuple,
    mean: tl.tensor,
    mean_stride: tl.tensor,
    sums: tl.tensor,
    sums_xmu: tl.tensor,
    parts: tl.tensor,
    steps: tl.tensor,
    C: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_MIXED: tl.constexpr,
    IS_HUGE: tl.constexpr,
) -> None:
    """sum dy and sum dy (x - mean) of each tile, [T, C]; and its part, [T]."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    tile, stretch, first_slab, end, numbers = _find_tile(table, steps, blocks)
    sample_slabs, positions, owner, is_aligned = numbers
    x, dy = _find_view(xs, table, tile), _find_view(dys, table, tile)
    first_channel = tl.program_id(0) % blocks * BLOCK_C
    place = stretch, sample_slabs, positions, first_channel, C

    part = _find_part(indices, table, tile, stretch, owner)
    channels = first_channel + tl.arange(0, BLOCK_C)
    mu = tl.load(mean + part * mean_stride + channels, mask=channels < C, other=0)
    if IS_MIXED and is_aligned == 0:
        sum_dy, sum_dy_xmu = _add_up(x, dy, mu, place, first_slab, end, AXIS, BLOCK_C, BLOCK_P, 1, IS_HUGE)
    else:
        sum_dy, sum_dy_xmu = _add_up(x, dy, mu, place, first_slab, end, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)

    tl.store(parts + tile, part)
    tl.store(sums + tile.to(tl.int64) * C + channels, sum_dy, mask=channels < C)
    tl.store(sums_xmu + tile.to(tl.int64) * C + channels, sum_dy_xmu, mask=channels < C)


@triton.jit
def _add_up(
    x: tl.tuple,
    dy: tl.tuple,
    mu: tl.tensor,
    place: tl.tuple,
    first_slab: tl.tensor,
    end: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_HUGE: tl.constexpr,
) -> tl.tuple:
    """The sums of a tile."""
    channel = place[3]
    sum_dy, sum_dy_xmu = mu * 0, mu * 0
    for slab in range(first_slab, end):
        sample, position, _, mask = _find_slab(slab, place, AXIS, BLOCK_C, BLOCK_P, VECTOR)
        elements = _find_elements(x, sample, position, channel, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)
        values = tl.load(elements, mask=mask, other=0).to(mu.dtype)
        elements = _find_elements(dy, sample, position, channel, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)
        grads = tl.load(elements, mask=mask, other=0).to(mu.dtype)

        sum_dy += tl.sum(grads, AXIS)
        sum_dy_xmu += tl.sum(grads * (values - tl.expand_dims(mu, AXIS)), AXIS)

    return sum_dy, sum_dy_xmu


@triton.jit(do_not_specialize=["num_tiles"])
def merge_sums(
    sums: tl.tensor,
    sums_xmu: tl.tensor,
    parts: tl.tensor,
    totals: tl.tensor,
    totals_xmu: tl.tensor,
    num_tiles: tl.tensor,
    C: tl.tensor,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """The sums of each part, [P, C], from those of its tiles, always in the same order; 0 where it has none."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)

    total = tl.zeros([BLOCK_C], totals.dtype.element_ty)
    total_xmu = tl.zeros([BLOCK_C], totals.dtype.element_ty)
    for first in range(0, num_tiles, BLOCK_T):
        tiles = first + tl.arange(0, BLOCK_T)
        is_here = tl.load(parts + tiles, mask=tiles < num_tiles, other=-1) == part
        mask = is_here[:, None] & (channels < C)[None, :]
        vectors = tiles.to(tl.int64)[:, None] * C + channels[None, :]
        total += tl.sum(tl.load(sums + vectors, mask=mask, other=0), 0)
        total_xmu += tl.sum(tl.load(sums_xmu + vectors, mask=mask, other=0), 0)

    tl.store(totals + part.to(tl.int64) * C + channels, total, mask=channels < C)
    tl.store(totals_xmu + part.to(tl.int64) * C + channels, total_xmu, mask=channels < C)


# ---- scale and shift, and the gradient of a feature


@triton.jit
def transform(
    table: tl.tuple,
    xs: tl.tuple,
    dys: tl.tuple,
    ys: tl.tuple,
    indices: tl.tuple,
    vectors: tl.tuple,
    vector_strides: tl.tuple,
    C: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_MIXED: tl.constexpr,
    IS_HUGE: tl.constexpr,
    HAS_GRADS: tl.constexpr,
) -> None:
    """y = scale * (x - mean) + shift, and with gradients + factor * dy; vectors: mean, scale, shift, factor, [P, C]."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    tile, stretch, slab, _, numbers = _find_tile(table, 1, blocks)
    sample_slabs, positions, owner, is_aligned = numbers
    x, dy, y = _find_view(xs, table, tile), _find_view(dys, table, tile), _find_view(ys, table, tile)
    place = stretch, sample_slabs, positions, tl.program_id(0) % blocks * BLOCK_C, C

    part = _find_part(indices, table, tile, stretch, owner)
    rows = vectors, vector_strides, part
    if IS_MIXED and is_aligned == 0:
        _transform_slab(x, dy, y, rows, place, slab, AXIS, BLOCK_C, BLOCK_P, 1, IS_HUGE, HAS_GRADS)
    else:
        _transform_slab(x, dy, y, rows, place, slab, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE, HAS_GRADS)


@triton.jit
def _transform_slab(
    x: tl.tuple,
    dy: tl.tuple,
    y: tl.tuple,
    rows: tl.tuple,
    place: tl.tuple,
    slab: tl.tensor,
    AXIS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
    IS_HUGE: tl.constexpr,
    HAS_GRADS: tl.constexpr,
) -> None:
    """See `transform`: a tile is a slab."""
    vectors, strides, part = rows
    channel, C = place[3], place[4]
    sample, position, _, mask = _find_slab(slab, place, AXIS, BLOCK_C, BLOCK_P, VECTOR)

    channels = channel + tl.arange(0, BLOCK_C)
    mean = tl.load(vectors[0] + part * strides[0] + channels, mask=channels < C, other=0)
    scale = tl.load(vectors[1] + part * strides[1] + channels, mask=channels < C, other=0)
    shift = tl.load(vectors[2] + part * strides[2] + channels, mask=channels < C, other=0)

    elements = _find_elements(x, sample, position, channel, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)
    values = tl.load(elements, mask=mask, other=0).to(mean.dtype)
    values = tl.expand_dims(scale, AXIS) * (values - tl.expand_dims(mean, AXIS)) + tl.expand_dims(shift, AXIS)

    if HAS_GRADS:
        factor = tl.load(vectors[3] + part * strides[3] + channels, mask=channels < C, other=0)
        elements = _find_elements(dy, sample, position, channel, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)
        values += tl.expand_dims(factor, AXIS) * tl.load(elements, mask=mask, other=0).to(mean.dtype)

    elements = _find_elements(y, sample, position, channel, AXIS, BLOCK_C, BLOCK_P, VECTOR, IS_HUGE)
    tl.store(elements, values.to(y[0].dtype.element_ty), mask=mask)


is_interpreted = not isinstance(transform, triton.JITFunction)  # TRITON_INTERPRET was set at import

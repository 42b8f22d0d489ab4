"""The features of a call as they lie for Triton's kernels, and their cut into launches and tiles: numbers alone.

The words are those of triton_kernels.py. A plan is kept for the next call with the same sizes: to make it takes longer
than to launch a kernel.

Shape letters: N samples, C channels, L features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

__all__ = ["Form", "Launch", "Strides", "Table", "order_dimensions", "plan_launches"]

_MOST_FEATURES = 8  # of a launch: a detector has 5 levels, and the arguments of a kernel must fit into 4 KB
_NUM_PROGRAMS = 2048  # that share the statistics of a launch: about 16 for each multiprocessor of a large GPU
_ELEMENTS = 2048  # of a slab: so few for each thread that no register spills
_LONGEST = 512  # positions of a slab in planes
_WIDEST = 64  # channels of a slab in rows, where there are many positions
_WIDEST_LOAD = 16  # bytes


class Form(NamedTuple):
    """A tensor [N, C, ...] but for its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Table(NamedTuple):
    """Numbers of the features of a launch, each a tuple of codes, see `_encode`."""

    first_tile: tuple[int, ...]
    slabs: tuple[int, ...]  # of a stretch
    sample_slabs: tuple[int, ...]  # of a sample
    positions: tuple[int, ...]  # of a sample
    owner: tuple[int, ...]  # of the first stretch: its row of statistics, or its part; -1: a tensor has the parts
    is_aligned: tuple[int, ...]  # 1: sizes and strides allow the widest loads


class Strides(NamedTuple):
    """Strides of tensors [N, C, P], one for each feature of a launch, as codes; the inner one is 1."""

    sample: tuple[int, ...]
    outer: tuple[int, ...]  # of channels in planes, of positions in rows


class Launch(NamedTuple):
    """One start of a kernel, and the tensors that it works on.

    Args:
        members: its features, by their places in the call.
        is_planes: how they lie.
        are_copied: of the features, of their gradients ...: which of them lie otherwise and are to be copied.
        strides: of the features, of their gradients ..., of new outputs.
        table: numbers of the features.
        steps: slabs of a tile.
        end: the number of the tile after the last.
        num_programs: one for each tile and block of channels.
        constants: what a kernel is compiled for.
    """

    members: tuple[int, ...]
    is_planes: bool
    are_copied: tuple[tuple[bool, ...], ...]
    strides: tuple[Strides, ...]
    table: Table
    steps: int
    end: int
    num_programs: int
    constants: dict[str, Any]


class _Shape(NamedTuple):
    """A feature as samples of positions; strides of it, of its gradient ..."""

    samples: int
    positions: int
    sample_strides: list[int]
    outer_strides: list[int]


@lru_cache(1024)
def plan_launches(
    forms: tuple[tuple[Form, ...], ...], owners: tuple[int, ...], are_cut: tuple[bool, ...], has_outputs: bool = False
) -> tuple[Launch, ...]:
    """Launches for the features of a call; empty ones are in none.

    Args:
        forms: of the L features, of their gradients ...
        owners: of the first stretch of each feature, see `Table`.
        are_cut: for each feature whether each of its samples is a stretch; else all of them are one.
        has_outputs: whether a new feature is made of each; a tile is then one slab.
    """
    launches: list[Launch] = []
    for members, is_planes in _group(forms[0]):
        tensors = [[role[index] for index in members] for role in forms]
        are_copied = tuple(tuple(not _fits(form, is_planes) for form in role) for role in tensors)
        if has_outputs:
            tensors.append([_make_dense(form, is_planes) for form in tensors[0]])

        shapes = []
        for index, *roles in zip(members, *tensors, strict=True):
            laid_out = [form if _fits(form, is_planes) else _make_dense(form, is_planes) for form in roles]
            shapes.append(_view(laid_out, is_planes, are_cut[index]))

        first_tile = launches[-1].end if launches else 0
        stretches = [(owners[index], are_cut[index]) for index in members]
        cut = _cut(shapes, stretches, tensors[0][0], is_planes, first_tile, may_take_steps=not has_outputs)
        launches.append(Launch(members, is_planes, are_copied, *cut))

    return tuple(launches)


# ---- how features lie


def order_dimensions(num_dimensions: int, is_planes: bool) -> tuple[int, ...]:
    """The dimensions of a dense tensor [N, C, ...] from the outermost to the innermost."""
    return tuple(range(num_dimensions)) if is_planes else (0, *range(2, num_dimensions), 1)


def _group(forms: Sequence[Form]) -> list[tuple[tuple[int, ...], bool]]:
    """For each launch its features, of one type, and whether they are taken as planes."""
    present = [index for index, form in enumerate(forms) if math.prod(form.shape)]
    can_all_be_rows = all(_has_rows(forms[index]) for index in present)

    groups: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index in present:
        form = forms[index]
        is_planes = not can_all_be_rows and (_position_stride(form) == 1 or not _has_rows(form))
        groups.setdefault((form.dtype, is_planes), []).append(index)

    launches = []
    for (_, is_planes), members in groups.items():
        for start in range(0, len(members), _MOST_FEATURES):
            launches.append((tuple(members[start : start + _MOST_FEATURES]), is_planes))
    return launches


def _position_stride(form: Form) -> int | None:
    """The stride of all positions as one dimension; None: they have no common one."""
    dimensions = list(zip(form.shape, form.strides, strict=True))[2:]
    dimensions = [(size, stride) for size, stride in dimensions if size > 1]
    if not dimensions:
        return 1
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(dimensions)):
        return None
    return dimensions[-1][1]


def _has_rows(form: Form) -> bool:
    """Whether the channels of a position are neighbours."""
    return form.strides[1] == 1 or form.shape[1] == 1


def _fits(form: Form, is_planes: bool) -> bool:
    stride = _position_stride(form)
    return stride == 1 if is_planes else stride is not None and _has_rows(form)


def _make_dense(form: Form, is_planes: bool) -> Form:
    strides = [0] * len(form.shape)
    step = 1
    for dimension in reversed(order_dimensions(len(form.shape), is_planes)):
        strides[dimension] = step
        step *= form.shape[dimension]
    return form._replace(strides=tuple(strides))


def _view(forms: Sequence[Form], is_planes: bool, is_cut: bool) -> _Shape:
    """A feature, its gradient ... as [N, C, P]; in rows, where strides allow, all samples of a stretch are one."""
    samples, positions = forms[0].shape[0], math.prod(forms[0].shape[2:])
    sample_strides = [form.strides[0] if samples > 1 else 0 for form in forms]
    position_strides = [_position_stride(form) or 0 for form in forms]
    if is_planes:
        return _Shape(samples, positions, sample_strides, [form.strides[1] for form in forms])
    if is_cut:
        return _Shape(samples, positions, sample_strides, position_strides)

    nothing = [0] * len(forms)
    if positions == 1:
        return _Shape(1, samples, nothing, sample_strides)
    if samples == 1 or all(n == positions * p for n, p in zip(sample_strides, position_strides, strict=True)):
        return _Shape(1, samples * positions, nothing, position_strides)
    return _Shape(samples, positions, sample_strides, position_strides)


# ---- tiles


def _cut(
    shapes: Sequence[_Shape],
    stretches: Sequence[tuple[int, bool]],
    form: Form,
    is_planes: bool,
    first_tile: int,
    may_take_steps: bool,
) -> tuple[tuple[Strides, ...], Table, int, int, int, dict[str, Any]]:
    """The fields of a launch, from `strides` on."""
    num_channels = form.shape[1]
    block_c, block_p = _choose_block(num_channels, max(shape.positions for shape in shapes), is_planes)
    blocks = -(-num_channels // block_c)

    num_slabs = sum(shape.samples * -(-shape.positions // block_p) for shape in shapes)
    steps = max(1, num_slabs * blocks // _NUM_PROGRAMS) if may_take_steps else 1
    vector = max(1, _WIDEST_LOAD // form.dtype.itemsize)

    numbers = []
    tile = first_tile
    for shape, (owner, is_cut) in zip(shapes, stretches, strict=True):
        sample_slabs = -(-shape.positions // block_p)
        slabs = sample_slabs if is_cut else shape.samples * sample_slabs
        neighbours = shape.positions if is_planes else num_channels
        sizes = neighbours, *shape.sample_strides, *shape.outer_strides
        is_aligned = all(size % vector == 0 for size in sizes)
        numbers.append((tile, slabs, sample_slabs, shape.positions, owner, int(is_aligned)))
        tile += -(-slabs // steps) * (shape.samples if is_cut else 1)

    are_aligned = {row[-1] for row in numbers}
    most_per_thread = 16 if 1 in are_aligned else 8  # with narrow loads a thread has more channels, and their vectors
    constants = {
        "AXIS": int(is_planes),
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "VECTOR": vector if 1 in are_aligned else 1,
        "IS_MIXED": len(are_aligned) == 2,
        "IS_HUGE": max(max(shape.outer_strides) for shape in shapes) * max(block_c, block_p) >= 2**31,
        "num_warps": max(1, block_c * block_p // (32 * most_per_thread)),
    }

    sample_strides = zip(*(shape.sample_strides for shape in shapes), strict=True)
    outer_strides = zip(*(shape.outer_strides for shape in shapes), strict=True)
    pairs = zip(sample_strides, outer_strides, strict=True)
    strides = tuple(Strides(_encode(sample), _encode(outer)) for sample, outer in pairs)
    table = Table(*map(_encode, zip(*numbers, strict=True)))
    return strides, table, steps, tile, (tile - first_tile) * blocks, constants


def _choose_block(num_channels: int, most_positions: int, is_planes: bool) -> tuple[int, int]:
    """Channels and positions of a slab, powers of 2: long along the neighbours, so that loads are wide and adjoin."""
    channels, positions = _power_of_2(num_channels), _power_of_2(most_positions)
    block_p = min(positions, _LONGEST if is_planes else _ELEMENTS // min(channels, _WIDEST))
    return min(channels, _ELEMENTS // block_p), block_p


def _power_of_2(number: int) -> int:
    """The first one from a number on."""
    return 1 << (number - 1).bit_length()


def _encode(numbers: Sequence[int]) -> tuple[int, ...]:
    """Odd numbers above 1 for numbers from -1 on.

    Triton compiles a kernel anew where a number is 1 or divisible by 16, and the sizes of a detector's features change
    with every batch.
    """
    return tuple(2 * number + 5 for number in numbers)

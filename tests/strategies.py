"""Hypothesis strategies: sizes of levels, shares of workers, splits of a batch."""

from __future__ import annotations

from hypothesis import strategies as st

__all__ = ["level_sizes", "seeds", "splits"]

seeds = st.integers(0, 2**31 - 1)


@st.composite
def level_sizes(draw: st.DrawFn, max_levels: int = 4) -> list[tuple[int, int, int]]:
    """(N, H, W) of one or more levels, each with at least two elements per channel."""
    num_samples = draw(st.integers(1, 3))
    side = st.integers(1, 5)
    sizes = draw(st.lists(st.tuples(st.just(num_samples), side, side), min_size=1, max_size=max_levels))
    return [(n, h + 1 if n * h * w < 2 else h, w) for n, h, w in sizes]


@st.composite
def splits(draw: st.DrawFn, total: int, max_parts: int = 5) -> list[int]:
    """Sizes of parts, empty ones included, that add up to `total`."""
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=max_parts - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]

"""Python's garbage collector, kept from objects that are no garbage.

It looks at every object again and again while many come, such as the records of a data set or the modules of torch.
Standard library only.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["without_collection"]


@contextlib.contextmanager
def without_collection(*, is_kept: bool = False) -> Iterator[None]:
    """A block without garbage collection.

    Args:
        is_kept: all that there is at its end stays until the process ends, and no collection looks at it again.

    Note:
        Objects that nobody refers to are freed as ever; those in cycles wait for the next collection.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_kept:
            gc.freeze()
        if was_collecting:
            gc.enable()

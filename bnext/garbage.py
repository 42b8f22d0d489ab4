"""Python's garbage collector, kept from objects that are no garbage.

It looks at every object again and again while many come, such as the records of a data set or the modules of torch.
Standard library only.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["without_collection"]

_REST = 16  # blocks, after which all is collected: what is passed over as old may be garbage
_num_blocks = 0


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """A block without garbage collection, whose objects count as old at its end: the next collection passes them over.

    Note:
        Objects that nobody refers to are freed as ever; those in cycles wait for a collection of all, which comes after
        16 blocks at the latest.
    """
    global _num_blocks
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else those that somebody has frozen would thaw
            gc.freeze()
            gc.unfreeze()
        if was_collecting:
            gc.enable()
            _num_blocks += 1
            if _num_blocks % _REST == 0:
                gc.collect()

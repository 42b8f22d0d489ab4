"""Random numbers that are a function of named integers, and leave the caller's generators alone.

What is drawn here never depends on how many random numbers somebody drew before, nor on how
many processes load the data: that is what lets a training be resumed exactly. NumPy's legacy global
generator is among them because Detectron2's augmentations draw from it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["Purpose", "derive_seed", "seed_everything", "seeded"]


class Purpose(enum.IntEnum):
    """The purpose of a seed, so that no two purposes draw the same numbers. A new one takes a new number."""

    SHUFFLE = 1
    AUGMENT = 2
    REPLACE = 3  # an image that cannot be used
    STEP = 4
    INITIALIZE = 5
    LOAD_VIRTUAL = 6
    RUN_VIRTUAL = 7
    REESTIMATE = 8
    VALIDATE = 10
    ORDER = 11
    LOAD_VALIDATION = 12
    SHUFFLE_DOMAIN = 13
    DRAW_DOMAIN = 14
    CORRUPT = 15
    AUXILIARY = 17


def derive_seed(*entropy: int) -> int:
    """A seed that is a fixed function of several integers.

    Args:
        entropy: integers in [0, 2**64), e.g. the training's seed, a purpose and an iteration. Their
            order matters, and neighbouring values give unrelated seeds.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> derive_seed(1, 2) == derive_seed(1, 2), derive_seed(1, 2) == derive_seed(2, 1)
        (True, False)
    """
    # SeedSequence ignores trailing zeros and the borders between long numbers: give it both.
    words = [len(entropy)]
    for number in entropy:
        words += divmod(number, 2**32)

    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Set the global generators of Python, NumPy and torch (all devices).

    Args:
        seed: an integer of 0 or more; NumPy's legacy generator sees its lowest 32 bits.

    Note:
        Changes the global generators; `seeded` puts them back.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block the global CPU generators start from `seed`; afterwards they are as before.

    Args:
        seed: an integer of 0 or more.

    Note:
        The generators of CUDA devices are left alone: data loading and initialization draw on the CPU.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(())
        >>> with seeded(3):
        ...     bool(torch.rand(()) == first)
        True
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)

    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)

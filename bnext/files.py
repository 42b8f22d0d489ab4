"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file that nobody sees half written: under another name first, then renamed.

    Args:
        path: the file; what is there stays as it is if writing fails.
        write: puts the content into the open binary file.

    Raises:
        OSError: if the folder cannot be written; whatever `write` raises.
    """
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise

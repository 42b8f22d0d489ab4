"""Files that are whole or absent, and where they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["find_local_file", "is_same_file", "replace_file"]


def find_local_file(address: str) -> str | None:
    """The file of an address, without what follows "?" in it; None: it is on no disk of this machine."""
    return None if "://" in address else address.split("?")[0]


def is_same_file(path: str | os.PathLike[str], address: str) -> bool:
    """Whether writing `path` would change what an address names, be it through a link."""
    file = find_local_file(address)
    return file is not None and os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file)


def replace_file(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write a file that nobody sees half written: under another name first, then renamed.

    Args:
        path: the file; what is there stays as it is if writing fails.
        write: puts the content into the open binary file.
        previous: takes what is there, if anything, just before the new file takes its place.

    Raises:
        OSError: if the folder cannot be written; whatever `write` raises.

    Note:
        A process that is ended from outside meanwhile (SIGTERM, SIGKILL) leaves `path`.partial.
    """
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and os.path.exists(path):
            os.replace(path, previous)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise

"""Files that are whole or absent, what is written into them, and where they are."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

__all__ = ["drop_nan", "find_local_file", "is_same_file", "replace_file", "write_json"]


def find_local_file(address: str) -> str | None:
    """The file of an address, without what follows "?" in it; None: it is on no disk of this machine."""
    return None if "://" in address else address.split("?")[0]


def is_same_file(path: str | os.PathLike[str], address: str) -> bool:
    """Whether writing `path` would change what an address names, be it through a link."""
    file = find_local_file(address)
    return file is not None and os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file)


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file that nobody sees half written: under another name first, then renamed.

    Args:
        path: the file; what is there stays as it is if writing fails.
        write: puts the content into the open binary file.

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

        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file, whole or not at all; its folder is made if it is missing.

    Args:
        path: the file.
        value: of dictionaries, lists, strings and numbers; those that are not finite become null.

    Raises:
        OSError: if the folder cannot be written.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    text = json.dumps(drop_nan(value), indent=2, allow_nan=False)
    replace_file(path, lambda file: file.write(f"{text}\n".encode()))


def drop_nan(value: Any) -> Any:
    """The same numbers, lists and dictionaries with None for NaN and Inf: JSON has none of them.

    COCO has no number where there is no object; a model that has diverged has none for its loss.
    """
    if isinstance(value, Mapping):
        return {key: drop_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [drop_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The checkpoint that an output folder goes on from: its file `last_checkpoint` names one beside it."""

from __future__ import annotations

import os
from pathlib import Path

from bnext.errors import CheckpointError, Refusal, list_few

__all__ = ["find_last_checkpoint"]

NAMES_NO_FILE = Refusal(
    CheckpointError,
    "OUTPUT_DIR/last_checkpoint",
    "name a checkpoint of its folder",
    "{remedy}",
)

_LONGEST = 4096  # bytes of a path


def find_last_checkpoint(folder: str) -> str:
    """The file that `last_checkpoint` of a folder names; "" where there is no such file.

    Raises:
        CheckpointError: it cannot be read, is empty, or names no file of the folder.
    """
    note = os.path.join(folder, "last_checkpoint")
    if not os.path.lexists(note):
        return ""

    try:
        if not os.path.isfile(note):
            raise _refuse(folder, "no file but a folder, a link to nothing, or a pipe")
        with open(note, "rb") as file:
            content = file.read(_LONGEST)
        name = content.decode().strip()
    except UnicodeDecodeError:
        raise _refuse(folder, f"other bytes than text, {content[:20]!r}") from None
    except OSError as error:
        raise _refuse(folder, f"{type(error).__name__}: {error.strerror}") from error

    path = os.path.join(folder, name)
    if not name:
        raise _refuse(folder, "an empty file")
    if not name.isprintable():
        raise _refuse(folder, f"other bytes than a name, {name[:20]!r}")
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise _refuse(folder, f"{name!r}, which is not in it")
    if not os.path.isfile(path):
        raise _refuse(folder, f"{name!r}, which does not exist" if not os.path.exists(path) else f"{name!r}, no file")
    return path


def _refuse(folder: str, got: str) -> Exception:
    remedy = "Remove it, and start the training from the beginning: there is no other checkpoint."
    others = sorted(Path(folder).glob("*.pth"), key=lambda path: path.stat().st_mtime)
    if others:
        latest = list_few([path.name for path in reversed(others)])
        remedy = f"Write the name of one that is there into it ({latest}), or remove it to start from the beginning."
    return NAMES_NO_FILE.of(got, folder, remedy=remedy)

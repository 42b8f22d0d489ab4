"""Files that are whole or absent, what is written into them, where they are, and why the machine refuses them."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from bnext.errors import LaunchError, is_interrupted

__all__ = [
    "drop_nan",
    "explain_os_error",
    "find_local_file",
    "is_same_file",
    "naming_file",
    "read_stamp",
    "remove_partials",
    "replace_file",
    "try_file",
    "write_folder",
    "write_json",
]

_PARTIAL = ".partial"
_FREE_SPACE = "Free some space, or choose another folder; what was written before is whole."
# What a person can do about it; of everything else: correct the path.
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f); what was written before is whole.",
    errno.EISDIR: "Move the folder of that name away, or choose another one.",
    errno.EACCES: "Give yourself the right to write there, or choose another folder.",
    errno.EPERM: "Give yourself the right to write there, or choose another folder.",
    errno.EROFS: "Choose a folder on a disk that can be written to.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.EIO: "Check the disk, or choose another folder; what was written before is whole.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ENOMEM: "Free some memory, or use smaller batches.",
}


def find_local_file(address: str) -> str | None:
    """The file of an address, without what follows "?" in it; None: it is on no disk of this machine."""
    return None if "://" in address else address.split("?")[0]


def is_same_file(path: str | os.PathLike[str], address: str) -> bool:
    """Whether writing `path` would change what an address names, be it through a link."""
    file = find_local_file(address)
    return file is not None and os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file)


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file that nobody sees half written: under a name of this process first, then renamed.

    Args:
        path: the file; what is there stays as it is if writing fails.
        write: puts the content into the open binary file.

    Raises:
        OSError: the file cannot be written, which it names; also where `write`, such as torch.save, hides the reason.

    Note:
        A process that is ended from outside meanwhile (SIGTERM, SIGKILL) leaves a file that `remove_partials` finds.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe, such as /dev/null, stays what it is
        with open(path, "wb") as file:
            write(file)
        return

    partial = f"{path}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}"
    fault: list[OSError] = []
    try:
        with io.BufferedWriter(_RememberingFile(partial, fault)) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)

        if is_interrupted(error):
            raise KeyboardInterrupt from error
        reason = fault[0] if fault else error
        if isinstance(reason, OSError) and reason.filename in (None, partial) and isinstance(error, Exception):
            raise OSError(reason.errno, reason.strerror, path) from error
        raise


def try_file(path: str | os.PathLike[str]) -> None:
    """Find out, before what takes long, whether `write_json` can write a file, which stays as it is.

    Raises:
        OSError: it cannot.

    Note:
        Its folder is made if it is missing.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe
        return

    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path)):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def write_folder(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Make a folder that nobody sees half filled: under a name of this process first, then renamed.

    Args:
        path: of the folder, which is not there yet, or is empty.
        write: called with the path of a folder, which it fills.

    Raises:
        OSError: there is something in the folder, or it cannot be written.
    """
    path = os.fspath(path).rstrip(os.sep)
    partial = f"{path}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}"
    try:
        os.mkdir(partial)
        write(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _RememberingFile(io.FileIO):
    """A file that keeps the error of its disk, as torch.save raises another one that does not tell it."""

    def __init__(self, path: str, fault: list[OSError]) -> None:
        super().__init__(path, "x")
        self._fault = fault

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._fault.append(error)
            raise


def read_stamp(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """Path, time and size of a file, which are others when it has changed.

    Raises:
        OSError: there is none.
    """
    status = os.stat(path)
    return os.path.abspath(path), status.st_mtime_ns, status.st_size


def remove_partials(path: str | os.PathLike[str]) -> None:
    """Remove what processes that were ended while they wrote have left: of a file, or of all files of a folder."""
    path = os.fspath(path)
    pattern = os.path.join(glob.escape(path), "*") if os.path.isdir(path) else glob.escape(path)
    for partial in glob.glob(f"{pattern}.*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if os.path.isdir(partial) else os.remove(partial)


@contextlib.contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block an OSError that names no file is one of this file.

    Raises:
        OSError: with the path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def explain_os_error(error: BaseException) -> LaunchError | None:
    """The line for a person whose machine refuses a file; None: the error is of something else.

    Args:
        error: an OSError with a file or of a disk, or torch's error for shared memory that is full.
    """
    if is_interrupted(error):
        return None
    if isinstance(error, RuntimeError) and ("shared memory" in str(error) or "torch_shm" in str(error)):
        remedy = "Give the container more (--shm-size), or use DATALOADER.NUM_WORKERS 0."
        return LaunchError.of("the shared memory", "have room for batches", got=_first_line(error), remedy=remedy)

    if isinstance(error, RuntimeError) and "unexpected pos" in str(error):  # of torch.save in other code
        return LaunchError.of("the disk", "take what is saved", got=_first_line(error), remedy=_FREE_SPACE)

    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _REMEDIES):
        return None
    if isinstance(error, (ConnectionError, TimeoutError)):
        return None

    thing = "the disk" if error.filename is None else f"the file {os.fsdecode(error.filename)!r}"
    remedy = _REMEDIES.get(error.errno or 0, "Correct the path, or choose another.")
    return LaunchError.of(thing, "be one that this machine can use", got=error.strerror or str(error), remedy=remedy)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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

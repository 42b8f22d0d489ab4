"""The right to write a folder or a file: held by one process, told to others, and free again when that process dies.

Readers ask for nothing. The lock is one of the operating system (POSIX record locks): children do not inherit it, so
that the kernel frees it with the process itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator

from bnext.errors import LaunchError, Refusal
from bnext.files import naming_file, remove_partials
from bnext.notices import tell_once

__all__ = ["holding"]

_LOGGER = logging.getLogger(__name__)
_NAME = ".bnext.lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

HELD = Refusal(
    LaunchError,
    "{thing}",
    "be written by one run at a time",
    "Wait for that run, end it, or choose another {thing}.",
)

_depths: dict[tuple[int, str], int] = {}  # of the locks of a process (a fork has none): it may ask for its own again


@contextlib.contextmanager
def holding(path: str | os.PathLike[str], thing: str) -> Iterator[None]:
    """Hold the right to write a folder, which exists, or a file within the block.

    Args:
        path: the folder or file.
        thing: option or key that names it, in messages.

    Raises:
        LaunchError: another process holds it; the message says which one, and since when.
        OSError: the folder cannot be written.

    Note:
        A process that holds it may ask again. What dead holders left half written is removed. On a disk without
        locks nothing is held, which is said once.
    """
    path = os.path.realpath(path)
    key = (os.getpid(), path)
    if key in _depths:
        _depths[key] += 1
        try:
            yield
        finally:
            _depths[key] -= 1
        return

    folder, name = os.path.split(path)
    lock = os.path.join(path, _NAME) if os.path.isdir(path) else os.path.join(folder, f".{name}.lock")
    descriptor = _acquire(lock, path, thing)
    if descriptor is None:
        yield
        return

    _depths[key] = 1
    try:
        remove_partials(path)
        yield
    finally:
        del _depths[key]
        if os.getpid() == key[0]:  # a fork that leaves the block has nothing to give back
            with contextlib.suppress(OSError):
                os.unlink(lock)  # while it is held: who opened it before sees that it is another file now
        os.close(descriptor)


def _acquire(lock: str, path: str, thing: str) -> int | None:
    """The open lock file; None on a disk without locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = os.path.exists(lock) and os.path.samestat(os.fstat(descriptor), os.stat(lock))
            if is_current:
                with naming_file(lock):
                    _write_owner(descriptor)
                return descriptor
            os.close(descriptor)  # its owner has removed it; the next one counts

        except OSError as error:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            if error.errno in _HELD_BY_ANOTHER:
                raise HELD.of(f"{path!r}, which {owner} holds", thing=thing) from None
            if error.errno not in _NO_LOCKS:
                raise

            message = "The disk of %s %s has no locks (%s): nothing keeps a second run from writing there, too."
            tell_once(_LOGGER, path, message, thing, path, error.strerror)
            return None
        except BaseException:
            os.close(descriptor)
            raise


def _write_owner(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(owner).encode())


def _read_owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

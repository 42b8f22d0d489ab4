"""Where the workers of several machines meet: who is missing, or comes twice, is told, and nobody waits silently."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch.distributed as dist

from bnext.errors import LaunchError, Refusal, list_few

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["check_address", "is_loopback", "meet"]

_LOGGER = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_SPEAK_SECONDS = (10.0, 60.0)  # the first line about a wait, and then one every

BAD_ADDRESS = Refusal(
    LaunchError, "--dist-url", "be tcp://<address>:<port>", "Give the address of machine 0 and a free port of it."
)
PORT_IN_USE = Refusal(
    LaunchError,
    "the port of --dist-url",
    "be free on machine 0",
    "Give another port on every machine, or end what listens there; on another machine than the first give "
    "--machine-rank 1 or higher.",
)
NO_STORE = Refusal(
    LaunchError,
    "machine 0",
    "answer at --dist-url",
    "Start it with --machine-rank 0, and check address, port and firewall.",
)
CAME_TWICE = Refusal(
    LaunchError, "every machine", "have a --machine-rank of its own", "Number the machines from 0 and start all anew."
)
OTHER_SIZE = Refusal(
    LaunchError,
    "--num-machines and --num-gpus",
    "be equal on every machine",
    "Give the same numbers everywhere and start all anew.",
)
NOT_ALL_CAME = Refusal(
    LaunchError,
    "all machines",
    "start within {minutes:.0f} minutes",
    "Start every machine, with the same --dist-url and --num-machines.",
)


def check_address(url: str) -> None:
    """Raise LaunchError unless workers of several machines could meet at an address of --dist-url."""
    try:
        parts = urlsplit(url)
        is_right = parts.scheme != "tcp" or bool(parts.hostname and parts.port)
    except ValueError:  # a port that is no number
        is_right = False
    if not is_right or "://" not in url:
        raise BAD_ADDRESS.of(repr(url))


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine alone."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def meet(url: str, rank: int, size: int, workers_per_machine: int, timeout: timedelta) -> Store:
    """Wait until all workers have come to an address.

    Args:
        url: tcp://<address of worker 0>:<port>.
        rank: of this worker.
        size: number of all workers.
        workers_per_machine: as many on each.
        timeout: for the last one.

    Returns:
        The store that they share.

    Raises:
        LaunchError: the port is taken, worker 0 cannot be reached, workers come twice or with other numbers, or not
            in time. All of those who have come are told.
    """
    store = _open_store(url, rank, timeout)
    try:
        return _meet(store, url, rank, size, workers_per_machine, timeout)
    except LaunchError:
        if rank == 0:
            time.sleep(5 * _POLL_SECONDS)  # the store ends with this worker: the others read it before
        raise
    except dist.DistError as error:
        raise NO_STORE.of(f"the loss of worker 0: {next(iter(str(error).splitlines()), '')}", url) from error


def _meet(store: Store, url: str, rank: int, size: int, workers_per_machine: int, timeout: timedelta) -> Store:
    own_size = f"{size} workers, {workers_per_machine} on each machine"
    first_size = store.compare_set("bnext/size", "", own_size).decode()
    if first_size != own_size:
        _refuse(store, OTHER_SIZE.of(f"{first_size}, and {own_size} on {socket.gethostname()}", url))
    if store.add(f"bnext/rank/{rank}", 1) > 1:
        machine = rank // workers_per_machine
        got = f"{machine} twice, the second time on {socket.gethostname()}"
        _refuse(store, CAME_TWICE.of(got, url))

    def look() -> str:
        if store.check(["bnext/fault"]):
            raise LaunchError(store.get("bnext/fault").decode())
        missing = [other for other in range(size) if not store.check([f"bnext/rank/{other}"])]
        return f"worker(s) {list_few(missing)} of {size}" if missing else ""

    missing = _wait(look, url, timeout, speaks=rank % workers_per_machine == 0)
    if missing:
        error = NOT_ALL_CAME.of(f"no {missing}", url, minutes=timeout.total_seconds() / 60)
        _refuse(store, error)
    return dist.PrefixStore("bnext/world", store)  # type: ignore[attr-defined]  # torch's stubs lack both


def _refuse(store: Store, error: Exception) -> None:
    """Raise an error here, and in all who wait."""
    store.set("bnext/fault", str(error))
    raise error


def _open_store(url: str, rank: int, timeout: timedelta) -> Store:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 0

    if rank != 0:
        reason = _wait(lambda: _try_to_connect(host, port), url, timeout, speaks=True)
        if reason:
            raise NO_STORE.of(reason, url)

    try:
        store: Store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=rank == 0, wait_for_workers=False, timeout=timeout
        )
    except (RuntimeError, ValueError, OSError) as error:
        if rank == 0 and ("EADDRINUSE" in str(error) or "already in use" in str(error)):
            raise PORT_IN_USE.of("one that is in use", url) from error
        raise NO_STORE.of(next(iter(str(error).splitlines()), type(error).__name__), url) from error
    return store


def _try_to_connect(host: str, port: int) -> str:
    """ "" if someone listens there, else why not."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except socket.gaierror as error:
        raise NO_STORE.of(f"{error.strerror} ({host})") from error
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _wait(look: Callable[[], str], url: str, timeout: timedelta, *, speaks: bool) -> str:
    """Look again until there is nothing left to wait for, and say now and then for what; what it was at the end."""
    start = time.monotonic()
    speak_at, period = _SPEAK_SECONDS

    while True:
        missing = look()
        waited = time.monotonic() - start
        if not missing or waited > timeout.total_seconds():
            return missing

        if speaks and waited > speak_at:
            _LOGGER.warning("Waiting for %s (%s), %.0f s so far.", missing, url, waited)
            speak_at = waited + period
        time.sleep(_POLL_SECONDS)

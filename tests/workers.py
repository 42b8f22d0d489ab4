"""Run a function in R real gloo workers on loopback.

The processes are started once (imports cost seconds) and serve many checks; each check gets a
process group of its own size, made and destroyed around it. Messages are pickled by hand: a pipe of
torch.multiprocessing would send tensors as handles to memory of a process that may have gone on.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["MAX_WORKERS", "run_workers"]

MAX_WORKERS = 3
START_SECONDS = 90.0
_pool: list[tuple[Any, Connection]] = []


def run_workers(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(rank, *args)` in a world of `world_size` gloo workers.

    Args:
        function: of a module's top level; arguments and results travel by pickle.
        timeout: seconds after which the workers are ended.

    Returns:
        What the workers returned, by rank.

    Raises:
        AssertionError: with the traceback of the worker that failed.
        TimeoutError: a worker did not answer.
    """
    seconds = timeout if _pool else timeout + START_SECONDS
    if not _pool:
        _start()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        members = _pool[:world_size]
        for rank, (_, connection) in enumerate(members):
            connection.send_bytes(pickle.dumps((function, rank, world_size, store, timeout, args)))
        answers = _collect([connection for _, connection in members], seconds)
    failures = [f"worker {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def _start() -> None:
    # The server imports once, in a process without threads of its own, and forks the workers.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "bnext"])
    for _ in range(MAX_WORKERS):
        ours, theirs = context.Pipe()
        # A daemon ends with this process; if this process is killed, its pipe ends and so does the worker.
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _pool.append((process, ours))


def _stop() -> None:
    for process, connection in _pool:
        connection.close()
        process.kill()
        process.join()
    _pool.clear()


def _collect(connections: list[Connection], seconds: float) -> list[tuple[bool, Any]]:
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    answers: dict[Connection, tuple[bool, Any]] = {}
    try:
        while len(answers) < len(connections):
            left = (deadline - datetime.datetime.now()).total_seconds()
            ready = wait([connection for connection in connections if connection not in answers], max(left, 0))
            if not ready:
                raise TimeoutError(f"{len(connections) - len(answers)} workers gave no answer in {seconds} s")
            answers.update({connection: pickle.loads(connection.recv_bytes()) for connection in ready})
    except BaseException:
        _stop()
        raise
    return [answers[connection] for connection in connections]


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send_bytes(pickle.dumps(_answer(*pickle.loads(connection.recv_bytes()))))


def _answer(
    function: Callable[..., Any], rank: int, world_size: int, store: str, timeout: float, args: tuple[Any, ...]
) -> tuple[bool, Any]:
    try:
        limit = datetime.timedelta(seconds=timeout / 2)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
        try:
            dist.barrier()  # who leaves early takes the store's file away from those who still connect
            return True, function(rank, *args)
        finally:
            dist.destroy_process_group()
    except Exception:
        return False, traceback.format_exc()

"""Starting the workers of a training: on GPUs with NCCL, on CPU cores with gloo, or under torchrun.

Detectron2's `launch` needs CUDA in some of its versions, and leaves the process group to the
interpreter's exit. Here the group is ended explicitly, and when a worker fails the others are
ended and its own message is the one that is reported.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

import bnext.errors
from bnext.distributed.groups import count_cores
from bnext.errors import BNextError, LaunchError
from bnext.files import write_json

__all__ = ["DEFAULT_TIMEOUT", "count_workers", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class _World(NamedTuple):
    """Where the workers find one another, and how many they are."""

    url: str
    size: int
    workers_per_machine: int
    timeout: timedelta
    uses_gpus: bool


def launch(
    main: Callable[..., Any],
    num_workers_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
    device: str = "cuda",
) -> None:
    """Run `main(*args)` in every worker; in this process if there is one worker only.

    Args:
        main: an importable function (the workers are fresh processes).
        num_workers_per_machine: one per GPU; one per CPU core at most where `device` is no GPU or
            the machine has none. 0 means one worker.
        num_machines: machines that take part, each of which calls `launch`.
        machine_rank: this machine, in [0, num_machines).
        dist_url: where the workers meet, e.g. "tcp://10.0.0.1:29500"; "auto" takes a free port of
            this machine.
        args: positional arguments of `main`, picklable.
        timeout: how long a collective waits for the others.
        device: of the model (MODEL.DEVICE); with "cpu" the workers are CPU workers on any machine.

    Raises:
        LaunchError: if the machine has not that many GPUs or cores, or a worker was ended by a signal.
        BNextError: as raised in a worker.
        RuntimeError: if a worker failed otherwise; its traceback is the message.

    Note:
        Under torchrun (RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in the environment) this
        process joins the world that it finds, and the numbers given here are not used.
    """
    size = count_workers(num_workers_per_machine, num_machines, machine_rank, dist_url, device)
    uses_gpus = _count_gpus(device) > 0
    if size == 1:
        main(*args)
        return

    if _is_torchrun():
        rank, _, local_rank, local_size = (int(os.environ[name]) for name in _TORCHRUN)
        with _process_group(_World("env://", size, local_size, timeout, uses_gpus), rank, local_rank):
            main(*args)
        return

    if dist_url == "auto":
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("127.0.0.1", 0))  # a free port
            dist_url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    num_workers = size // num_machines
    world = _World(dist_url, size, num_workers, timeout, uses_gpus)

    with tempfile.TemporaryDirectory(prefix="bnext-launch-") as folder:
        _spawn(main, args, world, machine_rank * num_workers, folder)


def count_workers(
    num_workers_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
) -> int:
    """Number of workers that `launch` would start or join, on all machines; refuses what it would refuse.

    Args:
        num_workers_per_machine, num_machines, machine_rank, dist_url, device: see `launch`.

    Returns:
        1 or more; under torchrun WORLD_SIZE.

    Raises:
        LaunchError: if the numbers make no sense, or this machine has not that many GPUs or cores.
    """
    if _is_torchrun():
        if _count_gpus(device):
            _check_devices(int(os.environ["LOCAL_WORLD_SIZE"]), device, "--nproc-per-node")
        return int(os.environ["WORLD_SIZE"])

    is_ranked = 0 <= machine_rank < num_machines
    has_address = num_machines == 1 or dist_url != "auto"
    port = "name a port of machine 0 for several machines"
    requests = (
        ("--num-gpus", num_workers_per_machine, num_workers_per_machine >= 0, "be 0 or more", "Use 1 for one worker."),
        ("--num-machines", num_machines, num_machines >= 1, "be 1 or more", "Use 1 for this machine alone."),
        ("--machine-rank", machine_rank, is_ranked, f"lie in [0, {num_machines})", "Number the machines from 0."),
        ("--dist-url", "'auto'", has_address, port, "Give the same tcp://<address>:<port> on every machine."),
    )
    for option, value, is_right, rule, remedy in requests:
        if not is_right:
            raise LaunchError.of(option, rule, got=value, remedy=remedy)

    num_workers = max(num_workers_per_machine, 1)
    _check_devices(num_workers, device, "--num-gpus")
    return num_workers * num_machines


def _is_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN)


def _count_gpus(device: str) -> int:
    """GPUs that workers with models on `device` may use."""
    return torch.cuda.device_count() if device.startswith("cuda") and torch.cuda.is_available() else 0


def _check_devices(num_workers: int, device: str, option: str) -> None:
    num_gpus = _count_gpus(device)
    limit = num_gpus or count_cores()
    if num_workers <= limit:
        return

    devices = "GPU(s) of this machine"
    if not num_gpus:
        reason = f"as MODEL.DEVICE is {device!r}" if torch.cuda.is_available() else "which has no GPU"
        devices = f"CPU core(s) of this machine, {reason}"
    raise LaunchError.of(option, f"be at most the {limit} {devices}", got=num_workers, remedy=f"Use {option} {limit}.")


def _spawn(main: Callable[..., Any], args: tuple[Any, ...], world: _World, first_rank: int, folder: str) -> None:
    context = start_processes(
        _worker, (main, args, world, first_rank, folder), world.workers_per_machine, join=False, start_method="spawn"
    )

    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        raise explain_failure(folder, error) from None
    except ProcessRaisedException as error:
        raise explain_failure(folder, None) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()
            process.join()


def explain_failure(folder: str, ended: ProcessExitedException | None) -> Exception:
    """The error to raise for the workers: of the failure that came first, as the others only lost their partner.

    Args:
        folder: where the workers' failures were recorded.
        ended: a worker that did not end by an exception, or None.
    """
    records = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]

    if ended is not None and (ended.signal_name or not records):
        cause = ended.signal_name or f"exit status {ended.exit_code}"
        reason = "often: out of memory; use fewer workers or smaller batches" if cause == "SIGKILL" else ""
        worker = f"Worker {ended.error_index}"
        return LaunchError.of(worker, "run to its end", got=cause, where=reason, remedy="See log.txt.")

    first = min(records, key=lambda record: record["time"])
    kind = getattr(bnext.errors, first["kind"], None)
    if isinstance(kind, type) and issubclass(kind, BNextError):
        return kind(first["message"])
    return RuntimeError(f"Worker {first['rank']} failed:\n{first['traceback']}")


def _worker(
    local_rank: int, main: Callable[..., Any], args: tuple[Any, ...], world: _World, first_rank: int, folder: str
) -> None:
    rank = first_rank + local_rank

    if world.size == world.workers_per_machine and sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: the name of the host need not resolve

    try:
        with _process_group(world, rank, local_rank, on_error=lambda error: record_failure(folder, rank, error)):
            main(*args)
    except BaseException as error:
        record_failure(folder, rank, error)  # also what failed before there was a group
        raise


def record_failure(folder: str, rank: int, error: BaseException) -> None:
    """Leave a failure of a worker for the parent; a worker's first one counts."""
    path = Path(folder, f"{rank}.json")
    if path.exists():
        return

    record = {
        "time": time.time(),
        "rank": rank,
        "kind": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }
    write_json(path, record)


@contextmanager
def _process_group(
    world: _World, rank: int, local_rank: int, on_error: Callable[[BaseException], None] = lambda error: None
) -> Iterator[None]:
    """Be a worker of the world within the block."""
    if world.uses_gpus:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, count_cores() // world.workers_per_machine))

    arguments: dict[str, Any] = {} if world.url == "env://" else {"world_size": world.size, "rank": rank}
    backend = "nccl" if world.uses_gpus else "gloo"
    dist.init_process_group(backend, init_method=world.url, timeout=world.timeout, **arguments)

    try:
        _make_local_group(world, rank)
        comm.synchronize()
        yield
        comm.synchronize()  # nobody leaves while another still talks to it
    except BaseException as error:
        on_error(error)  # before the group ends: its end makes the others fail too
        if not world.uses_gpus:
            _end_groups()
        # Ending NCCL's group waits for the others, who may sit in a collective that waits for this worker: it is
        # left to the end of this process, upon which the parent (or torchrun) ends the others.
        raise

    _end_groups()


def _make_local_group(world: _World, rank: int) -> None:
    """The group of this machine's workers, which Detectron2's `comm` asks for its local rank."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(world.workers_per_machine)
        return

    for first in range(0, world.size, world.workers_per_machine):
        ranks = list(range(first, first + world.workers_per_machine))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _end_groups() -> None:
    comm._LOCAL_PROCESS_GROUP = None

    for name in ("create_local_process_group", "_get_global_gloo_group"):
        forget = getattr(getattr(comm, name, None), "cache_clear", None)
        if forget is not None:
            forget()

    dist.destroy_process_group()

"""Starting the workers of a training: on GPUs with NCCL, on CPU cores with gloo, or under torchrun.

Detectron2's `launch` needs CUDA in some of its versions, and leaves the process group to the
interpreter's exit. Here the group is ended explicitly, when a worker fails the others are ended and
its own message is the one that is reported, and no worker outlives the process that started it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, ProcessRaisedException, start_processes

import bnext
import bnext.errors
from bnext.data.surroundings import Surroundings
from bnext.distributed.groups import count_cores
from bnext.engine.interrupts import GRACE_SECONDS, end_with_parent, holding_back_interrupts, take_interrupts_once
from bnext.engine.rendezvous import check_address, is_loopback, meet
from bnext.engine.streams import guard_streams
from bnext.errors import BNextError, LaunchError, Refusal, is_interrupted
from bnext.files import explain_os_error, write_json

__all__ = ["DEFAULT_TIMEOUT", "count_workers", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TORCHRUN_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
# What the backends say where the other end of a connection is gone.
_LOST_PARTNER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "ncclRemoteError")

LOST_PARTNER = Refusal(
    bnext.errors.WorkerError,
    "every worker",
    "go on to the end",
    "Look for the first error of the other workers, on the other machines, too.",
)
BAD_TORCHRUN = Refusal(
    LaunchError,
    "the launcher's variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
    "be those of torchrun",
    "Start with torchrun, or unset RANK for one machine without it.",
)
NOT_BEGUN = Refusal(
    LaunchError,
    "The program's module",
    "be one that every worker, a fresh process, can import anew",
    "The call that starts a training belongs under `if __name__ == '__main__':`; correct what else fails there.",
)
NOT_JOINED = Refusal(
    LaunchError,
    "the workers",
    "find one another",
    "Start all of them anew, with an address and a free port of the first machine that all can reach.",
)

NOT_PICKLABLE = Refusal(
    LaunchError,
    "What workers are given",
    "be picklable, as each is a fresh process",
    "Define classes and functions at the top level of a module or of the script, not inside of a function, in a "
    "notebook or as a lambda; in place of an object with open files, threads or a model give a function that makes it; "
    "or use one worker.",
)


class _World(NamedTuple):
    """The place where workers find one another, how many they are, and who started this machine's."""

    url: str
    size: int
    workers_per_machine: int
    timeout: timedelta
    uses_gpus: bool
    launcher: int


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
        dist_url: where the workers meet, e.g. "tcp://10.0.0.1:29500"; "auto" for those of one machine.
        args: positional arguments of `main`, picklable.
        timeout: how long a collective waits for the others.
        device: of the model (MODEL.DEVICE); with "cpu" the workers are CPU workers on any machine.

    Raises:
        LaunchError: if the machine has not that many GPUs or cores, the machines do not find one another, or a worker
            was ended by a signal.
        LaunchError: if `main` or an argument cannot be pickled.
        BNextError: as raised in a worker.
        KeyboardInterrupt: after Ctrl-C; all workers have ended.
        RuntimeError: if a worker failed otherwise; its traceback is the message.

    Note:
        Under torchrun (RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in the environment) this
        process joins the world that it finds, and the numbers given here are not used. Workers that are started import
        what `--import` has imported here, and know the data sets of the config, before they are given `args`.
    """
    size = count_workers(num_workers_per_machine, num_machines, machine_rank, dist_url, device)
    uses_gpus = _count_gpus(device) > 0
    if size == 1:
        main(*args)
        return

    if _is_torchrun():
        rank, _, local_rank, local_size = _read_torchrun()
        world = _World("env://", size, local_size, timeout, uses_gpus, os.getppid())
        end_with_parent(world.launcher)
        with _process_group(world, rank, local_rank):
            main(*args)
        return

    work = pickle_work(main, args)
    with tempfile.TemporaryDirectory(prefix="bnext-launch-") as folder:
        if dist_url == "auto":
            dist_url = f"file://{folder}/store"  # a free port could be taken until the workers come to it
        num_workers = size // num_machines
        world = _World(dist_url, size, num_workers, timeout, uses_gpus, os.getpid())
        _spawn(work, world, machine_rank * num_workers, folder)


def pickle_work(main: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """A function and its arguments as workers are given them: after what there has to be in a fresh process.

    Raises:
        LaunchError: they cannot be pickled, or no worker could find their code.
    """
    try:
        pickled = pickle.dumps((Surroundings(), main, args))
    except Exception as error:  # whatever an object's own reduction raises
        raise NOT_PICKLABLE.of(f"{type(error).__name__}: {error}") from error

    program = sys.modules["__main__"]
    has_file = getattr(program, "__spec__", None) is not None or os.path.exists(getattr(program, "__file__", ""))
    if b"__main__" in pickled and not has_file:
        raise NOT_PICKLABLE.of("code that was typed in, which no file holds")
    return pickled


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
        _, size, _, local_size = _read_torchrun()
        if _count_gpus(device):
            _check_devices(local_size, device, "--nproc-per-node")
        return size

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
    if dist_url != "auto":
        check_address(dist_url)

    num_workers = max(num_workers_per_machine, 1)
    _check_devices(num_workers, device, "--num-gpus")
    return num_workers * num_machines


def _is_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN)


def _read_torchrun() -> tuple[int, int, int, int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of the environment."""
    words = {name: os.environ[name] for name in _TORCHRUN}
    lacking = [name for name in _TORCHRUN_ADDRESS if name not in os.environ]
    try:
        rank, size, local_rank, local_size = (int(word) for word in words.values())
    except ValueError:
        raise BAD_TORCHRUN.of(str(words)) from None

    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise BAD_TORCHRUN.of(str(words))
    if size > 1 and lacking:
        raise BAD_TORCHRUN.of(f"no {' and '.join(lacking)}")
    return rank, size, local_rank, local_size


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


def _spawn(work: bytes, world: _World, first_rank: int, folder: str) -> None:
    resource_tracker.ensure_running()  # it would lift the block below
    context: ProcessContext | None = None
    torch_log = logging.getLogger("torch.multiprocessing.spawn")
    torch_log.addFilter(_is_worth_telling)

    try:
        with holding_back_interrupts():
            arguments = (work, world, first_rank, folder)
            context = start_processes(_worker, arguments, world.workers_per_machine, join=False, start_method="spawn")
        while not context.join():
            pass
    except ProcessExitedException as error:
        raise explain_failure(folder, error) from None
    except ProcessRaisedException as error:
        raise explain_failure(folder, None) from error
    except KeyboardInterrupt:
        if context is not None:
            _interrupt(context.processes, folder)
        raise
    finally:
        if context is not None:
            _end(context.processes)
        torch_log.removeFilter(_is_worth_telling)

    if any(Path(folder).glob("*.json")):  # torch takes a worker that was interrupted for one that is done
        raise explain_failure(folder, None)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Whether a line of torch's is another than that it ends workers whose partner failed, which is told."""
    return not record.getMessage().startswith("Terminating process")


def _interrupt(processes: Sequence[Any], folder: str) -> None:
    """Let workers put things in order; those that only import have nothing to."""
    for local_rank, process in enumerate(processes):
        if _ready_file(folder, local_rank).exists():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        else:
            process.terminate()

    until = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
        process.join()


def _ready_file(folder: str, local_rank: int) -> Path:
    """Present once a worker has imported all and takes interrupts."""
    return Path(folder, f"{local_rank}.ready")


def explain_failure(folder: str, ended: ProcessExitedException | None) -> BaseException:
    """The error to raise for the workers: of the failure that came first, as the others only lost their partner.

    Args:
        folder: where the workers' failures were recorded.
        ended: a worker that did not end by an exception, or None.
    """
    records = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]

    if (
        ended is not None
        and not ended.signal_name
        and not records
        and not _ready_file(folder, ended.error_index).exists()
    ):
        return NOT_BEGUN.of(f"exit status {ended.exit_code}, whose reason stands above")
    if ended is not None and (ended.signal_name or not records):
        cause = ended.signal_name or f"exit status {ended.exit_code}"
        reason = "often: out of memory; use fewer workers or smaller batches" if cause == "SIGKILL" else ""
        worker = f"Worker {ended.error_index}"
        return LaunchError.of(worker, "run to its end", got=cause, where=reason, remedy="See log.txt.")

    first = min(records, key=lambda record: (record["kind"] == "WorkerError", record["time"]))
    if first["kind"] == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = getattr(bnext.errors, first["kind"], None)
    if isinstance(kind, type) and issubclass(kind, BNextError):
        return kind(first["message"])
    return RuntimeError(f"Worker {first['rank']} failed:\n{first['traceback']}")


def _worker(local_rank: int, work: bytes, world: _World, first_rank: int, folder: str) -> None:
    rank = first_rank + local_rank
    end_with_parent(world.launcher)

    is_here = world.size == world.workers_per_machine or is_loopback(world.url)
    if is_here and sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: the name of the host need not resolve

    try:
        take_interrupts_once()
        guard_streams()
        bnext.register()
        _, main, args = pickle.loads(work)
        _ready_file(folder, local_rank).touch()
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
    error = explain_os_error(error) or error
    kind = KeyboardInterrupt if is_interrupted(error) else type(error)

    record = {
        "time": time.time(),
        "rank": rank,
        "kind": kind.__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }
    with suppress(OSError):  # the disk of temporary files is full, or the parent has gone with its folder
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

    backend, arguments = "nccl" if world.uses_gpus else "gloo", _join(world, rank)
    try:
        dist.init_process_group(backend, timeout=world.timeout, **arguments)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        raise NOT_JOINED.of(next(iter(str(error).splitlines()), ""), f"worker {rank}, {world.url}") from error

    try:
        _make_local_group(world, rank)
        comm.synchronize()
        yield
        comm.synchronize()  # nobody leaves while another still talks to it
    except BaseException as error:
        explained = _explain_lost_partner(error, rank) or error
        on_error(explained)  # before the group ends: its end makes the others fail too
        if not world.uses_gpus:
            _end_groups()
        # Ending NCCL's group waits for the others, who may sit in a collective that waits for this worker: it is
        # left to the end of this process, upon which the parent (or torchrun) ends the others.
        if explained is error:
            raise
        raise explained from error

    _end_groups()


def _join(world: _World, rank: int) -> dict[str, Any]:
    """Arguments of `init_process_group` by which the workers find one another."""
    if world.url == "env://":
        return {"init_method": world.url}

    numbers = {"world_size": world.size, "rank": rank}
    if world.url.startswith("tcp://"):
        store = meet(world.url, rank, world.size, world.workers_per_machine, world.timeout)
        return {"store": store, **numbers}
    return {"init_method": world.url, **numbers}


def _explain_lost_partner(error: BaseException, rank: int) -> BaseException | None:
    """One line for what a backend says when another worker has gone; None for any other error."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    text = str(error)
    if not any(words in text for words in _LOST_PARTNER):
        return None
    return LOST_PARTNER.of(f"the loss of another on worker {rank}", next(iter(text.strip().splitlines()), ""))


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

"""Several machines, tried on loopback: two launches of two workers each, and torchrun with two nodes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from bnext.distributed.groups import count_cores
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(650),
    pytest.mark.skipif(count_cores() < 2 or torch.cuda.is_available(), reason="two workers need two cores, no GPUs"),
]
SECONDS = 300


@pytest.fixture
def folder(digits, tmp_path):
    (tmp_path / "datasets").symlink_to(digits)
    return tmp_path


@pytest.fixture
def url():
    return f"tcp://127.0.0.1:{find_port()}"


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_machines(*commands):
    """Start all, and wait for all: (status, its lines of error) of each. Nothing is left of them."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for command in commands:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=tiny.ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)

    try:
        errors = [process.communicate(timeout=SECONDS)[1].splitlines() for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return [
        (process.returncode, [line for line in lines if line.startswith("error: ") or "Traceback" in line])
        for process, lines in zip(processes, errors, strict=True)
    ]


def machine(number, url, folder, *opts):
    return ("tests.engine.two_machines", number, url, folder, *opts)


def test_two_launches_train_together(folder, url):
    assert run_machines(machine(0, url, folder), machine(1, url, folder)) == [(0, []), (0, [])]
    assert len(list(folder.glob("*.trained"))) == 4
    assert (folder / "out" / "model_final.pth").exists()


def test_torchrun_with_two_nodes_trains_together(folder, url):
    port = url.rpartition(":")[2]
    commands = []
    for node in (0, 1):
        rendezvous = ("--master-addr", "127.0.0.1", "--master-port", port, "--nnodes", 2, "--node-rank", node)
        command = ("torch.distributed.run", *rendezvous, "--nproc-per-node", 2, "-m")
        commands.append((*command, *machine(node, "auto", folder)))
    assert run_machines(*commands) == [(0, []), (0, [])]
    assert len(list(folder.glob("*.trained"))) == 4


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((), ("SOLVER.MAX_ITER", 3), "SOLVER.MAX_ITER 2 on worker 0"),
        ((), ("MODEL.RETINANET.NUM_CLASSES", 11), "MODEL.RETINANET.NUM_CLASSES 10 on worker 0"),
        ((), ("MACHINES", 3), "6 workers"),
    ],
)
def test_machines_that_were_started_differently_are_told_what_differs(folder, url, first, second, words):
    results = run_machines(machine(0, url, folder, *first), machine(1, url, folder, *second))
    assert [status for status, _ in results] == [2, 2]
    for _, lines in results:
        assert len(lines) == 1
        assert words in lines[0]
    assert not list(folder.glob("out/*.pth"))


def test_two_machines_of_rank_0_are_told(folder, url):
    results = run_machines(machine(0, url, folder), machine(0, url, folder))
    assert [status for status, _ in results] == [2, 2]
    lines = [line for _, lines in results for line in lines]
    assert len(lines) == 2
    assert any("--machine-rank" in line for line in lines)


def test_a_port_that_is_in_use_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        ((status, lines),) = run_machines(machine(0, url, folder))
    assert status == 2
    assert len(lines) == 1
    assert url in lines[0]


def test_a_machine_that_does_not_come_is_waited_for_with_words(folder, url):
    ((status, lines),) = run_machines(machine(0, url, folder))
    assert status == 2
    assert len(lines) == 1
    assert "2, 3" in lines[0]

"""How workers end: with forked processes, and, marked slow, whole trainings that are interrupted or orphaned."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bnext.distributed.groups import count_cores
from bnext.engine.interrupts import end_with_parent, holding_back_interrupts, take_interrupts_once
from tests import tiny

whole_trainings = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(count_cores() < 2 or torch.cuda.is_available(), reason="two workers need two cores, no GPUs"),
]


def fork(function):
    """The number of a process that runs a function; its status is 0, or 130 after an interrupt."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return pid


def wait_for(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def await_end(pids, seconds):
    until = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    return [pid for pid in pids if is_running(pid)]


@pytest.mark.parametrize("dies_first", [False, True])
def test_a_process_ends_with_its_parent(dies_first):
    read, write = os.pipe()

    def be_parent():
        me = os.getpid()

        def be_worker():
            if dies_first:
                while os.getppid() == me:
                    time.sleep(0.01)
            end_with_parent(me)
            time.sleep(60)

        os.write(write, str(fork(be_worker)).encode())
        if not dies_first:
            time.sleep(0.3)
        os.kill(me, signal.SIGKILL)

    assert wait_for(fork(be_parent)) == -signal.SIGKILL
    worker = int(os.read(read, 20))
    try:
        assert await_end([worker], 10) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_an_interrupt_waits_until_it_can_be_taken_and_comes_once():
    def work():
        with holding_back_interrupts():
            signal.raise_signal(signal.SIGINT)
            started = fork(take)  # it inherits the block, not what waits
            assert wait_for(started) == 130
            try:
                take_interrupts_once()
            except KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)  # disturbs nothing
                os._exit(7)

    def take():
        signal.raise_signal(signal.SIGINT)
        take_interrupts_once()

    assert wait_for(fork(work)) == 7


def start_training(folder, digits, workers):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    environment |= {"DETECTRON2_DATASETS": str(digits), "OMP_NUM_THREADS": "1"}
    options = ("OUTPUT_DIR", folder, "SOLVER.MAX_ITER", "4000", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1")
    command = [sys.executable, "tools/train_net.py", "--num-gpus", workers, "--config-file", tiny.CONFIG, *options]
    return subprocess.Popen(
        [*map(str, command)],
        cwd=tiny.ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def list_group(process):
    listed = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split() if is_running(int(pid))]


def await_stage(process, folder, stage):
    """Wait until a training of two workers imports, has started its workers, or has saved a checkpoint."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        assert process.poll() is None
        if stage == "imports":
            time.sleep(2)
            return
        if stage == "workers" and len(list_group(process)) >= 3:
            time.sleep(1)
            return
        if stage == "training" and (folder / "last_checkpoint").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"the training did not reach its {stage}")


@pytest.mark.parametrize(
    ("workers", "stage", "to_all"),
    [
        pytest.param(workers, stage, to_all, marks=whole_trainings)
        for workers, stage, to_all in (
            (1, "imports", True),
            (1, "training", True),
            (2, "workers", True),
            (2, "workers", False),
            (2, "training", True),
            (2, "training", False),
        )
    ],
)
def test_ctrl_c_is_one_line_and_leaves_no_process(digits, tmp_path, workers, stage, to_all):
    """From the terminal, which interrupts all processes, and to the command alone."""
    folder = tmp_path / "out"
    process = start_training(folder, digits, workers)
    try:
        await_stage(process, folder, stage)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        error = process.communicate(timeout=90)[1]
        assert process.returncode == 130
        lines = [line for line in error.splitlines() if "CUDA" not in line]  # torch's, of a machine without
        assert len(lines) == 1
        assert lines[0].startswith("interrupted")
        assert await_end(list_group(process), 20) == []
        assert not list(tmp_path.glob("**/*.partial")) + list(tmp_path.glob("**/.bnext.lock"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=whole_trainings) for stage in ("workers", "training")])
def test_workers_whose_launcher_was_killed_end_by_themselves(digits, tmp_path, stage):
    folder = tmp_path / "out"
    process = start_training(folder, digits, 2)
    try:
        await_stage(process, folder, stage)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert await_end(list_group(process), 40) == []
        assert (folder / "last_checkpoint").exists() == (stage == "training")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

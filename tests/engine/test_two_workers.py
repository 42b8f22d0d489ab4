"""Trainings on two real workers: the checks of two_workers.py in one spawn, the slow ones in another."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from bnext.distributed.groups import count_cores
from tests import tiny
from tests.engine.two_workers import CHECKS, REGISTER, SLOW_CHECKS

pytestmark = pytest.mark.skipif(
    count_cores() < 2 or torch.cuda.is_available(), reason="two workers need two cores, and would use GPUs"
)


def run(*command, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    environment |= variables
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tiny.ROOT,
        env=environment,
        timeout=280,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished_work(digits, tmp_path_factory):
    """The folder in which two workers did all checks, and what their command said."""
    return do_checks(digits, tmp_path_factory.mktemp("two_workers"))


@pytest.fixture(scope="module")
def finished_slow_work(digits, tmp_path_factory):
    return do_checks(digits, tmp_path_factory.mktemp("two_workers_slow"), "slow")


def do_checks(digits, folder, *which):
    (folder / "datasets").symlink_to(digits)
    module = folder / "environment.py"
    module.write_text(REGISTER.format(name="environment"))
    return folder, run("-m", "tests.engine.two_workers", folder, *which, DETECTRON2_ENV_MODULE=str(module))


@pytest.mark.timeout(300)  # the first one waits for all
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_workers(finished_work, check):
    expect_passed(*finished_work, check)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", SLOW_CHECKS)
def test_on_two_workers_for_longer(finished_slow_work, check):
    expect_passed(*finished_slow_work, check)


def expect_passed(folder, result, check):
    names = {path.name for path in folder.glob(f"{check}[01].passed")}
    assert names == {f"{check}0.passed", f"{check}1.passed"}, result.stdout[-3000:] + result.stderr[-3000:]


def test_a_worker_that_fails_ends_the_other_and_its_message_is_reported(finished_work):
    _, result = finished_work
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("bnext.errors.DatasetError: worker 1 failed on purpose")


def test_buffers_that_were_made_equal_are_told(finished_work):
    assert "Norm buffers of the 2 workers were made equal" in finished_work[1].stdout


@pytest.mark.slow
def test_torchrun_workers_join_the_world_that_is_there(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1"]
    result = run(*command, "--master-port", port, "-m", "tests.engine.two_workers", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*.passed")} == {"torchrun0.passed", "torchrun1.passed"}

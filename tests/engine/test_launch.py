"""Starting workers: what is refused, how they are counted, which failure is reported; see test_two_workers.py."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from bnext.distributed.groups import count_cores
from bnext.engine.launch import count_workers, explain_failure, launch, record_failure
from bnext.errors import LaunchError, WorkerError

needs_two_cores = pytest.mark.skipif(count_cores() < 2, reason="two workers need two cores")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def nothing():
    raise AssertionError("must not be reached")


@no_gpu
def test_more_workers_than_cores_are_refused():
    cores = count_cores()
    with pytest.raises(LaunchError, match=rf"--num-gpus .* {cores} CPU core.* got {cores + 1}"):
        launch(nothing, cores + 1)


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    # The one thing that cannot be had here: a machine with two GPUs.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match=r"--num-gpus .* 2 GPU.* got 3"):
        launch(nothing, 3)


def test_workers_of_a_cpu_model_are_counted_by_cores_beside_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4096)
    cores = count_cores()
    assert count_workers(4096, device="cuda") == 4096
    assert count_workers(cores, device="cpu") == cores
    with pytest.raises(LaunchError, match=rf"{cores} CPU core.*MODEL.DEVICE is 'cpu'"):
        launch(nothing, 4096, device="cpu")


def test_torch_does_not_tell_that_it_ends_the_other_workers(monkeypatch, tmp_path):
    """The line of the worker that failed is what a person reads."""
    module, logger, lines = sys.modules[launch.__module__], logging.getLogger("torch.multiprocessing.spawn"), []

    class Context:
        processes = ()

        def join(self):
            logger.warning("Terminating process %d via signal %s", 1, "SIGTERM")
            logger.warning("something else")
            return True

    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(module, "start_processes", lambda *words, **options: Context())
    logger.addHandler(handler)
    try:
        module._spawn(b"", SimpleNamespace(workers_per_machine=2), 0, str(tmp_path))
    finally:
        logger.removeHandler(handler)
    assert lines == ["something else"]


@needs_two_cores
def test_workers_of_a_cpu_model_use_gloo_beside_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    worlds = []
    monkeypatch.setattr(sys.modules[launch.__module__], "_spawn", lambda work, world, *rest: worlds.append(world))
    launch(nothing, 2, device="cpu")
    launch(nothing, 2, device="cuda")
    assert [world.uses_gpus for world in worlds] == [False, True]


def test_the_world_of_torchrun_counts(monkeypatch):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert count_workers(1, 0, device="cpu") == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match=r"--nproc-per-node .* 2 GPU"):
        count_workers(1)
    monkeypatch.delenv("LOCAL_RANK")
    assert count_workers(1, 3, 2, "tcp://127.0.0.1:1") == 3


@pytest.mark.parametrize("change", [{"RANK": "a"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "2"}, {"MASTER_PORT": None}])
def test_a_world_that_is_not_torchruns_is_refused(monkeypatch, change):
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **change}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    (name,) = change
    with pytest.raises(LaunchError, match=name):
        count_workers(1, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [((-1,), "--num-gpus"), ((1, 0), "--num-machines"), ((1, 2, 2), "--machine-rank"), ((1, 2, 0), "--dist-url")],
)
def test_requests_that_make_no_sense_are_refused(arguments, option):
    with pytest.raises(LaunchError, match=f"^{option} must"):
        launch(nothing, *arguments)


@pytest.mark.parametrize("number", [0, 1])
def test_one_worker_is_this_process(number):
    seen = []
    launch(seen.append, number, args=(7,))
    assert seen == [7]
    assert not torch.distributed.is_initialized()


def fail_as(kind, message):
    try:
        raise kind(message)
    except kind as error:
        return error


def test_the_first_failure_is_the_one_reported(tmp_path):
    record_failure(str(tmp_path), 1, fail_as(KeyError, "a bug"))
    record_failure(str(tmp_path), 0, fail_as(RuntimeError, "connection closed by peer"))
    reported = explain_failure(str(tmp_path), None)
    assert isinstance(reported, RuntimeError)
    assert str(reported).startswith("Worker 1 failed:\nTraceback")
    assert "KeyError: 'a bug'" in str(reported)


def test_an_interrupt_of_a_worker_is_one_of_the_command(tmp_path):
    """Also where torch.save hides it; the others only lost their partner."""
    hidden = fail_as(RuntimeError, "unexpected pos 704 vs 598")
    hidden.__context__ = KeyboardInterrupt()
    record_failure(str(tmp_path), 1, hidden)
    record_failure(str(tmp_path), 0, fail_as(WorkerError, "worker 1 has gone"))
    assert isinstance(explain_failure(str(tmp_path), None), KeyboardInterrupt)


def test_a_full_disk_of_a_worker_is_one_line(tmp_path):
    record_failure(str(tmp_path), 1, OSError(28, "No space left on device", "out/a.pth"))
    reported = explain_failure(str(tmp_path), None)
    assert isinstance(reported, LaunchError)
    assert "'out/a.pth'" in str(reported)


def test_a_worker_ended_by_a_signal_is_named(tmp_path):
    record_failure(str(tmp_path), 0, fail_as(RuntimeError, "connection closed by peer"))
    ended = ProcessExitedException("process 1 ended", 1, 0, -9, "SIGKILL")
    reported = explain_failure(str(tmp_path), ended)
    assert isinstance(reported, LaunchError)
    assert "Worker 1 must run to its end; got SIGKILL" in str(reported)
    assert "out of memory" in str(reported)


def test_a_program_that_workers_cannot_import_is_told_so(tmp_path):
    """Mostly one that starts a training whenever it is imported."""
    ended = ProcessExitedException("process 1 ended", 1, 0, 1, None)
    reported = explain_failure(str(tmp_path), ended)
    assert isinstance(reported, LaunchError)
    assert "__main__" in str(reported)

    (tmp_path / "1.ready").touch()
    assert "Worker 1 must run to its end" in str(explain_failure(str(tmp_path), ended))

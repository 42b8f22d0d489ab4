"""bnext.locks: one process at a time; a dead one holds nothing."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal

import pytest

from bnext.errors import LaunchError
from bnext.locks import holding


def in_child(function):
    """The status of a forked process that runs a function: 0, 3 where it was refused, else 4."""
    pid = os.fork()
    if pid == 0:
        status = 4
        try:
            function()
            status = 0
        except LaunchError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hold(path):
    with holding(path, "OUTPUT_DIR"):
        pass


def test_another_process_is_refused_until_the_first_has_ended(tmp_path):
    with holding(tmp_path, "OUTPUT_DIR"), holding(tmp_path, "OUTPUT_DIR"):
        assert in_child(lambda: hold(tmp_path)) == 3
        assert in_child(lambda: hold(tmp_path)) == 3, "nor did the refused one free it"
    assert in_child(lambda: hold(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_fork_that_leaves_the_block_frees_nothing(tmp_path):
    with contextlib.ExitStack() as stack:
        stack.enter_context(holding(tmp_path, "OUTPUT_DIR"))
        assert in_child(stack.close) == 0
        assert in_child(lambda: hold(tmp_path)) == 3
    assert list(tmp_path.iterdir()) == []


def test_the_refusal_names_the_holder(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with holding(tmp_path, "OUTPUT_DIR"):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    try:
        with (
            pytest.raises(LaunchError, match=rf"^OUTPUT_DIR must .*process {pid} on "),
            holding(tmp_path, "OUTPUT_DIR"),
        ):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    assert json.loads((tmp_path / ".bnext.lock").read_text())["pid"] == pid, "it could not remove its file"
    with holding(tmp_path, "OUTPUT_DIR"):
        assert json.loads((tmp_path / ".bnext.lock").read_text())["pid"] == os.getpid()


def test_a_file_is_held_beside_others_and_leftovers_are_removed(tmp_path):
    (tmp_path / "a.pth.1-f.partial").touch()
    (tmp_path / "b.pth.1-f.partial").touch()
    with holding(tmp_path / "a.pth", "--output"):
        assert in_child(lambda: hold(tmp_path / "a.pth")) == 3
        assert in_child(lambda: hold(tmp_path / "b.pth")) == 0
        assert not list(tmp_path.glob("*.partial"))


def test_a_child_does_not_inherit_what_a_dead_parent_held(tmp_path):
    """As a process that loads images does: it lives on for a while."""
    read, write = os.pipe()

    def die_with_a_child():
        with holding(tmp_path, "OUTPUT_DIR"):
            child = os.fork()
            if child == 0:
                signal.pause()
            os.write(write, str(child).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_with_a_child) == -signal.SIGKILL
    child = int(os.read(read, 20))
    try:
        hold(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_disk_without_locks_is_told_once(tmp_path, monkeypatch, caplog):
    # The one thing that cannot be had here: a disk without locks.
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(logging.getLogger("bnext"), "propagate", True)
    for _ in range(2):
        with holding(tmp_path, "OUTPUT_DIR"):
            pass
    lines = [record.getMessage() for record in caplog.records if str(tmp_path) in record.getMessage()]
    assert len(lines) == 1


def test_a_lock_that_is_no_file_is_none(tmp_path):
    os.mkfifo(tmp_path / ".bnext.lock")
    with holding(tmp_path, "OUTPUT_DIR"):
        assert in_child(lambda: hold(tmp_path)) == 0

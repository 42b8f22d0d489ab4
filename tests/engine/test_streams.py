"""Streams that cannot be written: in small processes, as each has three of its own."""

import io
import logging
import os
import sys

import pytest

from bnext.engine.streams import guard_log_files, guard_streams


def in_child(function, **descriptors):
    """The status and the standard error of a forked process with other standard streams."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(write, 2)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True, write_through=True)
            target = descriptors["stdout"]
            os.close(1) if target is None else os.dup2(target, 1)
            sys.stdout = None if target is None else io.TextIOWrapper(open(1, "wb", closefd=False), "ascii")  # noqa: SIM115
            function()
            status = 0
        finally:
            os._exit(status)

    os.close(write)
    with open(read) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def talk():
    guard_streams()
    guard_streams()  # once is enough
    for _ in range(3):
        print("a line with an umlaut, ü", flush=True)
    sys.stdout.flush()


@pytest.fixture
def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def test_a_closed_pipe_is_told_once(broken_pipe):
    status, text = in_child(talk, stdout=broken_pipe)
    assert status == 0
    assert len(text.splitlines()) == 1
    assert "standard output" in text


def test_a_full_disk_is_told_once():
    with open("/dev/full", "w") as full:
        status, text = in_child(talk, stdout=full.fileno())
    assert status == 0
    assert len(text.splitlines()) == 1


def test_a_closed_stream_is_nothing_and_its_number_is_no_files(tmp_path):
    def work():
        talk()
        with open(tmp_path / "file", "w") as file:
            assert file.fileno() > 2

    assert in_child(work, stdout=None) == (0, "")


def test_what_the_encoding_lacks_is_escaped(tmp_path):
    with open(tmp_path / "out", "w") as file:
        assert in_child(talk, stdout=file.fileno()) == (0, "")
    assert (tmp_path / "out").read_text().splitlines() == ["a line with an umlaut, \\xfc"] * 3


def test_streams_that_are_not_pythons_are_left_alone(capsys):
    before = sys.stdout, sys.stderr
    guard_streams()
    assert (sys.stdout, sys.stderr) == before


def test_a_log_file_that_is_full_is_told_once(capsys):
    logger = logging.getLogger("fvcore")
    with open("/dev/full", "w") as file:
        handler = logging.StreamHandler(file)
        logger.addHandler(handler)
        try:
            guard_log_files()
            for _ in range(3):
                logger.error("a line")
        finally:
            logger.removeHandler(handler)
    assert len(capsys.readouterr().err.splitlines()) == 1

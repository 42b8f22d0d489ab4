"""bnext.files."""

import errno
import io
import json
import os
import resource
import signal
import stat
from pathlib import Path

import pytest
import torch

from bnext.files import (
    explain_os_error,
    find_local_file,
    is_same_file,
    naming_file,
    remove_partials,
    replace_file,
    write_folder,
    write_json,
)


def test_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        replace_file(str(path), fail)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"ap": float("nan"), "losses": [1.5, float("inf")], "row": (1, "x")})
    assert json.loads(path.read_text()) == {"ap": None, "losses": [1.5, None], "row": [1, "x"]}


def test_addresses_of_files(tmp_path):
    path = tmp_path / "in.pth"
    assert find_local_file(f"{path}?matching_heuristics=True") == str(path)
    assert find_local_file("https://host/in.pth?x=1") is None
    assert not is_same_file(path, str(path)), "there is none"
    path.touch()
    (tmp_path / "link.pth").symlink_to(path)
    assert is_same_file(tmp_path / "link.pth", f"{path}?matching_heuristics=True")
    assert not is_same_file(tmp_path, str(path))
    assert not is_same_file(path, "https://host/in.pth")


def test_a_full_disk_is_an_error_of_the_file_also_where_torch_hides_it(tmp_path):
    path = tmp_path / "a.pth"
    replace_file(path, lambda file: torch.save({"a": 1}, file))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            replace_file(path, lambda file: torch.save({"a": torch.zeros(1 << 20)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    assert caught.value.filename == str(path)
    assert torch.load(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.pth"]
    assert str(path) in str(explain_os_error(caught.value))


def test_ctrl_c_stays_ctrl_c_also_where_torch_hides_it(tmp_path):
    class Interrupting(io.RawIOBase):
        def __init__(self, file):
            self.write, self.flush = self.interrupt, file.flush

        def interrupt(self, data):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a.pth", lambda file: torch.save({"a": torch.zeros(9)}, Interrupting(file)))
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a"

    def write_while_another_writes(file):
        file.write(b"first half, ")
        replace_file(path, lambda other: other.write(b"another one's"))
        file.write(b"second half")

    replace_file(path, write_while_another_writes)
    assert path.read_bytes() == b"first half, second half"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_what_dead_writers_left_is_removed(tmp_path):
    names = ("a.pth.1-0.partial", "b.pth.1-0.partial", "c.pth")
    for name in names:
        (tmp_path / name).touch()
    remove_partials(tmp_path / "a.pth")
    assert {item.name for item in tmp_path.iterdir()} == set(names[1:])
    remove_partials(tmp_path)
    assert {item.name for item in tmp_path.iterdir()} == {"c.pth"}


def test_a_folder_in_the_place_of_a_file_is_seen_before_anything_is_written(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        replace_file(tmp_path, lambda file: pytest.fail("it was begun"))
    assert caught.value.filename == str(tmp_path)


def test_errors_of_the_disk_are_lines_and_bugs_are_none(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, naming_file("metrics.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "'metrics.json'" in str(explain_os_error(caught.value))
    assert "shared memory" in str(explain_os_error(RuntimeError("unable to allocate shared memory(shm) for file")))
    for bug in (OSError("could not get source code"), KeyError("a"), RuntimeError("a"), ConnectionResetError(104, "x")):
        assert explain_os_error(bug) is None


def test_a_folder_is_whole_or_absent(tmp_path):
    def fill(folder):
        Path(folder, "a").write_text("whole")

    def fail(folder):
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", fail)
    assert not list(tmp_path.iterdir())

    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", fill)
    assert (tmp_path / "out" / "a").read_text() == "whole"
    with pytest.raises(OSError, match="not empty"):
        write_folder(tmp_path / "out", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_left_of_a_folder_is_removed(tmp_path):
    (tmp_path / "out.1-ab.partial").mkdir()
    (tmp_path / "out.1-ab.partial" / "a").write_text("half")
    remove_partials(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_device_is_written_to_and_stays_a_device():
    reader, writer = os.openpty()
    name = os.ttyname(writer)
    replace_file(name, lambda file: file.write(b"to a device\n"))
    assert os.read(reader, 20).startswith(b"to a device")
    assert stat.S_ISCHR(os.stat(name).st_mode)

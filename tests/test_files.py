"""bnext.files."""

import pytest

from bnext.files import replace_file


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

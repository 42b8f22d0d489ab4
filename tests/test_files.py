"""bnext.files."""

import json

import pytest

from bnext.files import find_local_file, is_same_file, replace_file, write_json


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

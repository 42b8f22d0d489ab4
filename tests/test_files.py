"""bnext.files."""

import pytest

from bnext.files import find_local_file, is_same_file, replace_file


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


def test_the_file_before_is_kept_where_it_is_wanted(tmp_path):
    path, previous = tmp_path / "a", tmp_path / "a.previous"
    for number in range(3):
        replace_file(path, lambda file, text=str(number): file.write(text.encode()), previous)
        assert previous.exists() == (number > 0)
    assert (path.read_text(), previous.read_text()) == ("2", "1")
    with pytest.raises(TypeError):
        replace_file(path, lambda file: file.write("no bytes"), previous)
    assert (path.read_text(), previous.read_text()) == ("2", "1")


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

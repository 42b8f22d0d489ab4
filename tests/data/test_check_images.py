"""Pictures of a set: there, whole, and of the sizes that their records give."""

import os

import numpy as np
import pytest
from PIL import Image

from bnext.data import check_images
from bnext.data.check_images import Pictures, check_files, check_sizes
from bnext.data.check_objects import Task
from bnext.errors import DatasetError

TASK = Task(is_training=True, is_labelled=True, max_side=1333)
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path):
    names = [f"{index}.png" for index in range(4)]
    for name in names:
        Image.fromarray(PIXELS).save(tmp_path / name)
    return Pictures(str(tmp_path), names, np.array([[64.0, 48.0]] * 4))


def test_whole_pictures_pass(pictures):
    assert list(check_files(pictures, TASK)) == []
    assert list(check_sizes(pictures, TASK)) == []
    unknown = Pictures(pictures.root, pictures.file_names, np.full((4, 2), np.nan))
    assert list(check_files(unknown, TASK)) == []
    assert list(check_sizes(unknown, TASK)) == []


@pytest.mark.parametrize("size", [(-1, -1), (0, 48), (64.5, 48), (np.inf, 48)])
def test_sizes_that_no_picture_has_are_refused(pictures, size):
    pictures.sizes[2] = size
    (fault,) = check_sizes(pictures, Task(is_training=False, is_labelled=False))
    assert "1 of 4: 2.png" in fault.got


def test_pictures_that_would_be_resized_to_nothing_are_refused(pictures):
    pictures.sizes[1] = (1, 3000)
    (fault,) = check_sizes(pictures, TASK)
    assert "1 x 3000 in 1 of 4: 1.png" in fault.got
    pictures.sizes[1] = (1, 2000)
    assert list(check_sizes(pictures, TASK)) == []


def test_a_picture_of_two_records_is_counted(pictures):
    twice = Pictures(pictures.root, ["0.png", "1.png", "0.png", "0.png"], pictures.sizes)
    (notice,) = check_sizes(twice, TASK)
    assert (notice.count, notice.total) == (2, 4)
    assert "0.png" in notice.words


def test_exchanged_sizes_are_told_from_others(pictures, tmp_path):
    pictures.sizes[:] = (48, 64)
    (fault,) = check_files(pictures, TASK)
    assert "4 of 4 with width and height exchanged" in fault.got
    assert "0.png is 64 x 48, its record says 48 x 64" in fault.where

    pictures.sizes[:] = (64, 48)
    pictures.sizes[3] = (64, 40)
    (fault,) = check_files(pictures, TASK)
    assert "1 of 4 of another size: 3.png" in fault.got


def test_turned_pictures_with_the_stored_size_are_counted(pictures, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(PIXELS).save(tmp_path / "1.png", exif=exif)
    (notice,) = check_files(pictures, TASK)
    assert (notice.count, notice.total) == (1, 4)
    assert "1.png" in notice.words

    pictures.sizes[1] = (48, 64)
    assert list(check_files(pictures, TASK)) == []


def make_wide(path):
    Image.fromarray(np.full((48, 64), 4095, np.uint16)).save(path)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-3000])


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "message"), [(make_wide, "8 bits"), (cut_off, "truncated"), (put_pipe, "a pipe"), (os.unlink, "missing")]
)
def test_what_cannot_be_read_is_named_before_a_training(pictures, tmp_path, spoil, message):
    spoil(tmp_path / "2.png")
    try:
        said = next(check_files(pictures, TASK)).got
    except DatasetError as error:
        said = str(error)
    assert message in said
    assert "2.png" in said


def test_file_names_keep_the_message_in_one_line(pictures):
    named = Pictures(pictures.root, ["a\nb.png", "c\\d.png", "", "0.png"], pictures.sizes)
    fault = next(check_files(named, TASK))
    assert "\n" not in fault.got
    assert "3 of 4 missing" in fault.got
    assert "/" in fault.remedy


def test_of_many_pictures_some_are_looked_into(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(check_images, "MOST_HEADERS", 2)
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(b"")
    assert list(check_files(pictures, TASK)) == []
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"3\.png"):
        list(check_files(pictures, TASK))

"""Pictures that are read as they are meant, or named; never white without a word, and never waited for."""

import os

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as read_detectron2
from PIL import Image

from bnext.data.read_image import Header, read_header, read_image, refuse_endless_file
from bnext.errors import DatasetError

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
GREY = (RAMP * 255).round().astype(np.uint8)
RGB = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def save(folder, pixels, ending="png", mode=None, turn=None):
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    if turn is not None:
        exif[274] = turn
    path = folder / f"picture.{ending}"
    (image if mode is None else image.convert(mode)).save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGB", "webp")],
)
@pytest.mark.parametrize("image_format", ["BGR", "L", "YUV-BT.601"])
def test_pictures_of_8_bits_are_read_as_detectron2_reads_them(tmp_path, mode, ending, image_format):
    path = save(tmp_path, RGB, ending, mode)
    np.testing.assert_array_equal(read_image(path, image_format), read_detectron2(path, image_format))


@pytest.mark.parametrize(
    ("pixels", "ending"),
    [
        ((RAMP * 65535).astype(np.uint16), "png"),
        ((RAMP * 4095).astype(np.uint16), "png"),
        ((RAMP * 1e6).astype(np.int32), "tiff"),
        ((RAMP * -9).astype(np.int32), "tiff"),
        (RAMP.astype(np.float32), "tiff"),
        (np.full_like(RAMP, np.nan, np.float32), "tiff"),
    ],
)
def test_values_that_8_bits_would_clip_are_refused(tmp_path, pixels, ending):
    path = save(tmp_path, pixels, ending)
    with pytest.raises(DatasetError, match=r"8 bits.*picture"):
        read_image(path, "BGR")
    assert read_header(path).is_suspect


@pytest.mark.parametrize(("kind", "ending"), [(np.uint16, "png"), (np.int32, "tiff"), (np.float32, "tiff")])
def test_8_bits_in_a_wider_type_are_read(tmp_path, kind, ending):
    pixels = read_image(save(tmp_path, GREY.astype(kind), ending), "RGB")
    np.testing.assert_array_equal(pixels, GREY[:, :, None].repeat(3, axis=2))


def test_a_wide_format_that_is_asked_for_is_given(tmp_path):
    pixels = (RAMP * 1e6).astype(np.int32)
    np.testing.assert_array_equal(read_image(save(tmp_path, pixels, "tiff"), "I")[:, :, 0], pixels)


def test_a_turned_picture_follows_the_size_of_its_record(tmp_path):
    path = save(tmp_path, RGB, turn=6)
    stored = RGB[:, :, ::-1]
    np.testing.assert_array_equal(read_image(path, "BGR"), np.rot90(stored, -1))
    np.testing.assert_array_equal(read_image(path, "BGR", (48, 64)), np.rot90(stored, -1))
    np.testing.assert_array_equal(read_image(path, "BGR", (64, 48)), stored)
    assert read_header(path) == Header(stored=(64, 48), shown=(48, 64), is_suspect=False)

    path = save(tmp_path, RGB, turn=3)  # both sizes are the same: as it is shown
    np.testing.assert_array_equal(read_image(path, "BGR", (64, 48)), stored[::-1, ::-1])


def test_another_size_than_the_record_says_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"its record, 63 x 48; got 64 x 48 .*picture"):
        read_image(save(tmp_path, RGB), "BGR", (63, 48))


def test_the_content_counts_and_not_the_ending(tmp_path):
    path = save(tmp_path, RGB, "bmp")
    os.rename(path, tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), "RGB"), RGB)


def truncate(path):
    whole = RGB.tobytes()
    Image.frombytes("RGB", (64, 48), whole).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def lead_in_a_circle(path):
    path.symlink_to(path)


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "a web page": (lambda path: path.write_text("<html>404</html>"), "begins with b'<html>404"),
    "truncated": (truncate, "truncated"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "a pipe": (os.mkfifo, "a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a circle of links": (lead_in_a_circle, "symbolic links"),
    "absent": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("make", [pytest.param(value, id=key) for key, value in BROKEN.items()])
def test_what_is_no_picture_is_named_at_once(tmp_path, make):
    create, message = make
    path = tmp_path / "a\nb.png"
    create(path)
    with pytest.raises(DatasetError, match=message) as caught:
        read_image(str(path), "BGR")
    assert "a\\nb.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_headers_tell_of_a_file_that_may_be_cut_off(tmp_path):
    path = save(tmp_path, RGB)
    assert read_header(path) == Header((64, 48), (64, 48), is_suspect=False)
    truncate(tmp_path / "picture.png")
    assert read_header(path).is_suspect


def test_files_without_end_are_refused_before_a_mapper_of_the_users_own_opens_them(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="a pipe"):
        refuse_endless_file(str(tmp_path / "a.png"))
    for other in (None, 3, "", "a.zip/member.png", "s3://bucket/a.png", str(tmp_path)):
        refuse_endless_file(other)


def test_a_picture_that_is_too_large_for_pillow_is_not_called_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path, GREY)
    for read in (read_header, lambda path: read_image(path, "BGR")):
        with pytest.raises(DatasetError, match=r"200 pixels.*picture\.png.*MAX_IMAGE_PIXELS"):
            read(path)

"""Corruptions: the pixels of imagecorruptions, any size, the same for the same seed, and what is refused."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnext.data.corruptions.corrupt import corrupt
from bnext.data.corruptions.names import COMMON, NAMES, SEVERITIES, find_frost
from bnext.errors import ConfigError, DatasetError, LaunchError
from tests.data.corruptions.record_library import FILE, SEED, make_picture, take_pixels


@pytest.mark.parametrize("name", COMMON)
def test_pixels_are_those_of_imagecorruptions(name):
    recorded = json.loads(FILE.read_text())
    most = 4 if name == "jpeg_compression" else 1  # versions of libjpeg differ

    for severity in SEVERITIES:
        pixels = np.array(take_pixels(corrupt(make_picture(), name, severity, SEED)))
        difference = abs(pixels - recorded[f"{name} {severity}"])
        assert difference.max() <= most, severity
        assert (difference == 0).mean() > (0.8 if most == 1 else 0), severity


@pytest.mark.parametrize("severity", SEVERITIES)
def test_inversion_and_low_contrast(severity):
    threshold, factor = (0.8, 0.6, 0.4, 0.2, 0)[severity - 1], (0.75, 0.5, 0.35, 0.25, 0.15)[severity - 1]

    for value in range(256):
        picture = np.full((1, 1, 3), value, dtype=np.uint8)
        inverted = 255 - value if value / 255 >= threshold else value
        assert (corrupt(picture, "invert", severity) == inverted).all()
        grey = 127.5 + factor * (value - 127.5)
        assert (abs(corrupt(picture, "low_contrast", severity) - grey) <= 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_says_all_and_nothing_else_is_touched(name):
    picture = make_picture()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second, other = (corrupt(picture, name, 3, seed) for seed in (4, 4, 5))

    assert first.dtype == np.uint8
    assert (first == second).all()
    assert (first != picture).any()
    is_random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (first != other).any() == (is_random and name in COMMON)
    assert (picture == make_picture()).all()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@given(height=st.integers(32, 90), width=st.integers(32, 90), name=st.sampled_from(NAMES))
def test_any_size_of_32_pixels_or_more(height, width, name):
    picture = np.zeros((height, width, 3), dtype=np.uint8)  # black: nothing is divided by its largest value
    assert corrupt(picture, name, 5, seed=1).shape == picture.shape


@pytest.mark.parametrize(
    ("name", "severity", "words"),
    [
        ("fog", 6, "6"),
        ("fog", 0, "0"),
        ("fog", True, "True"),
        ("fog", "3", "'3'"),
        ("fog", None, "None"),
        ("gausian_noise", 1, "'gaussian_noise'"),
        ("Motion-Blur", 1, "'motion_blur'"),
        ("rain", 1, "'rain'"),
    ],
)
def test_what_is_no_corruption_is_refused(name, severity, words):
    with pytest.raises(ConfigError) as refused:
        corrupt(make_picture(), name, severity)
    assert words in str(refused.value)


def test_what_is_no_picture_is_refused():
    for shape in ((40, 40), (40, 40, 1), (0, 40, 3)):
        with pytest.raises(DatasetError, match="RGB"):
            corrupt(np.zeros(shape, dtype=np.uint8), "fog", 1)
    with pytest.raises(DatasetError, match="float64"):
        corrupt(np.zeros((40, 40, 3)), "fog", 1)

    with pytest.raises(DatasetError, match="40 x 31"):
        corrupt(np.zeros((31, 40, 3), dtype=np.uint8), "fog", 1)


def test_frost_without_its_pictures_names_the_package(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(LaunchError, match="pip install --no-deps imagecorruptions-imaug"):
        find_frost()

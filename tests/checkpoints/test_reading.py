"""Files of weights: whole or refused, of every kind that detectron2 reads, and without running what they hold."""

import argparse
import collections
import io
import os
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from bnext.checkpoints.reading import read_checkpoint
from bnext.errors import CheckpointError

STATE = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).state_dict()
ARRAYS = {key: value.numpy() for key, value in STATE.items()}


def torch_bytes(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def read(tmp_path, content, name="file.pth"):
    path = tmp_path / name
    path.write_bytes(content)
    return read_checkpoint(str(path))


def assert_whole(checkpoint):
    assert checkpoint["model"].keys() == ARRAYS.keys()
    for key, value in checkpoint["model"].items():
        assert np.array_equal(np.asarray(value), ARRAYS[key])


# ---- kinds of files


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["zoo.pkl", "arrays.pth"])
def test_pickles_of_arrays_are_read(tmp_path, protocol, name):
    assert_whole(read(tmp_path, pickle.dumps({"model": ARRAYS, "__author__": "zoo"}, protocol), name))


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("content", [STATE, {"model": STATE}])
@pytest.mark.parametrize("name", ["file.pth", "file.pkl"])
def test_files_of_torch_are_read_whatever_their_ending(tmp_path, content, is_zip, name):
    assert_whole(read(tmp_path, torch_bytes(content, _use_new_zipfile_serialization=is_zip), name))


def test_the_formats_of_others_keep_their_names(tmp_path):
    caffe2 = read(tmp_path, pickle.dumps({"blobs": {**ARRAYS, "x_momentum": np.ones(1)}}), "caffe2.pkl")
    assert_whole(caffe2)
    assert caffe2["matching_heuristics"]
    assert caffe2["__author__"] == "Caffe2"
    pycls = read(tmp_path, torch_bytes({"model_state": STATE}), "file.pyth")
    assert pycls["model"].keys() == {key for key in STATE if not key.endswith("tracked")}
    with pytest.raises(CheckpointError, match="model_state"):
        read(tmp_path, torch_bytes({"model": STATE}), "file.pyth")


# ---- damage


def damage(content, kind, rng):
    """Some bytes flipped, zeroed as in a hole of a sparse file, replaced, or cut."""
    content, place = bytearray(content), rng.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "hole":
        content[place : place + 600] = bytes(len(content[place : place + 600]))
    elif kind == "noise":
        content[place : place + 100] = rng.randbytes(len(content[place : place + 100]))
    else:
        del content[place:]
    return bytes(content)


@pytest.mark.parametrize("kind", ["flip", "hole", "noise", "cut"])
def test_a_damaged_file_is_refused_or_unharmed(tmp_path, kind):
    """13 of 15 flips were loaded once. What is between the parts of the zip file has no meaning."""
    whole, rng, refusals = torch_bytes({"model": STATE, "iteration": 3}), random.Random(kind), []
    for _ in range(30):
        try:
            checkpoint = read(tmp_path, damage(whole, kind, rng))
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        assert_whole(checkpoint)
    assert len(refusals) >= 20
    assert all("file.pth" in text and len(text.splitlines()) == 1 for text in refusals)
    assert not any("weights_only" in text for text in refusals)


@pytest.mark.parametrize(
    "content", [torch_bytes(STATE, _use_new_zipfile_serialization=False), pickle.dumps(ARRAYS)], ids=["torch", "pickle"]
)
def test_a_file_without_checksums_is_refused_where_it_is_cut_and_else_told(tmp_path, content, bnext_log):
    for size in range(0, len(content) - 1, len(content) // 20):
        with pytest.raises(CheckpointError, match=r"whole file.*file\.pth"):
            read(tmp_path, content[:size])
    bnext_log.clear()
    assert_whole(read(tmp_path, content))
    assert "no checksums" in bnext_log.text


def test_a_zip_file_that_was_saved_without_checksums_is_read_and_told(tmp_path, bnext_log):
    torch.serialization.set_crc32_options(False)
    try:
        content = torch_bytes(STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_whole(read(tmp_path, content))
    assert "no checksums" in bnext_log.text


OTHERS = {
    "a web page": b"<!DOCTYPE html><html></html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "safetensors": (20).to_bytes(8, "little") + b'{"a": {}}' + b" " * 40,
    "a JSON file": b'{"model": 1}',
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "zeros": bytes(600),
    "an empty file": b"",
    "UnpicklingError": b"MODEL: {}",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name}.*file"):
        read(tmp_path, OTHERS[name])


def test_other_zip_files_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", **ARRAYS)
    with pytest.raises(CheckpointError, match="archive of NumPy"):
        read_checkpoint(str(tmp_path / "arrays.npz"))


@pytest.mark.parametrize("content", [[1], 3, "text"])
@pytest.mark.parametrize("dump", [torch_bytes, pickle.dumps])
def test_other_values_than_a_dictionary_are_refused(tmp_path, content, dump):
    with pytest.raises(CheckpointError, match=f"state dict.*got a {type(content).__name__}"):
        read(tmp_path, dump(content))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="IsADirectoryError"):
        read_checkpoint(str(tmp_path))


# ---- code


class Code:
    """A value that runs a command when it is unpickled."""

    folder = ""

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["file.pth", "file.pkl", "file.pyth"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_no_file_runs_code(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(Code, "folder", str(tmp_path / "ran"))
    content = {"model": STATE if kind != "pickle" else ARRAYS, "model_state": {}, "other": Code()}
    dumped = (
        pickle.dumps(content)
        if kind == "pickle"
        else torch_bytes(content, _use_new_zipfile_serialization=kind == "zip")
    )
    with pytest.raises(CheckpointError, match=r"posix\.mkdir") as caught:
        read(tmp_path, dumped, name)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_calls_nothing_but_makers_of_values(tmp_path, protocol):
    for value in (print, nn.Linear, np.load, np.fromfile, eval):
        with pytest.raises(CheckpointError, match="hold tensors|hold NumPy"):
            read(tmp_path, pickle.dumps({"model": value}, protocol), "file.pkl")


@pytest.mark.parametrize("dump", [torch_bytes, pickle.dumps])
def test_numbers_of_numpy_and_arguments_may_stand_beside_the_weights(tmp_path, dump):
    others = {"best": np.float64(0.5), "n": np.int64(3), "list": np.ones(2), "args": argparse.Namespace(lr=1)}
    checkpoint = read(tmp_path, dump({"model": STATE if dump is torch_bytes else ARRAYS, **others}))
    assert_whole(checkpoint)
    assert checkpoint["best"] == 0.5
    assert checkpoint["n"] == 3
    assert checkpoint["args"].lr == 1
    assert np.array_equal(checkpoint["list"], np.ones(2))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (torch_bytes({"model": STATE, "x": collections.defaultdict(list)}), "collections.defaultdict"),
        (torch_bytes(nn.Linear(1, 1)), "Linear"),
        (torch_bytes(STATE, pickle_protocol=4), "protocol"),
        (pickle.dumps(STATE), "_rebuild_tensor"),
    ],
)
def test_what_is_refused_is_named_with_a_safe_way(tmp_path, content, name):
    with pytest.raises(CheckpointError, match=rf"{name}.*file\.pth.*torch\.save") as caught:
        read(tmp_path, content)
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)

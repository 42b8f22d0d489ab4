"""Sets of images on a disk: those of torchvision in their own files, a folder by classes, and what is not there."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from bnext.errors import ConfigError, DatasetError
from bnext.studies.classifiers import measure_accuracy
from bnext.studies.image_sets import load_image_set
from bnext.studies.images import Batches


def write_mnist(root, number=12):
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (number, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, number, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = struct.pack(">II", 0x801, number) + bytes(range(number))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(labels)
    return pixels


def test_mnist_is_read_from_its_files(tmp_path):
    pixels = write_mnist(tmp_path)
    images = load_image_set("mnist", "val", root=str(tmp_path), limit=5)
    assert images.pixels.shape == (5, 1, 28, 28)
    assert torch.equal((images.pixels[:, 0] * 255).round().byte(), torch.from_numpy(pixels[:5]))
    assert images.labels.tolist() == [0, 1, 2, 3, 4]
    assert load_image_set("mnist", "train", root=str(tmp_path), side=14).pixels.shape == (12, 1, 14, 14)


def write_folder(root):
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                picture = Image.new("RGB", (20 + index, 10), (100 * number, index, 0))
                picture.save(root / split / name / f"{index}.png")


def test_a_folder_is_read_when_it_is_needed(tmp_path):
    write_folder(tmp_path)
    images = load_image_set("folder", "train", root=str(tmp_path), side=8)
    batch = images.select(torch.tensor([5, 0]))
    assert batch.pixels.shape == (2, 3, 8, 8)
    assert batch.labels.tolist() == [1, 0]
    assert batch.pixels[0, 0].unique().tolist() == pytest.approx([100 / 255])
    assert load_image_set("folder", "val", root=str(tmp_path), limit=2).labels.tolist() == [0, 1], "of all classes"

    assert [len(each) for each in Batches(images, size=3, epochs=1)] == [3, 3]
    right = measure_accuracy(torch.nn.Identity(), images, forward=lambda _, pixels: pixels[:, [1, 0]].mean((2, 3)))
    assert right == 100, "the second class is red"


@pytest.mark.parametrize(("dataset", "named"), [("mnist", "MNIST"), ("cifar10", "CIFAR10"), ("folder", "train")])
def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path, dataset, named):
    with pytest.raises(DatasetError, match=named):
        load_image_set(dataset, "train", root=str(tmp_path / "absent"))


def test_another_set_is_refused():
    with pytest.raises(ConfigError, match="dataset"):
        load_image_set("imagenet", "train")


def test_cifar_10_is_read_from_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(4, -1), "labels": [3, 1, 2, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # The checksums of torchvision are of the real files, which nobody downloads here.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    images = load_image_set("cifar10", "val", root=str(tmp_path))
    assert torch.equal((images.pixels * 255).round().byte(), torch.from_numpy(pixels))
    assert len(load_image_set("cifar10", "train", root=str(tmp_path))) == 20

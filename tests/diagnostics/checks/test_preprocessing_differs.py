import copy
import dataclasses

import pytest
import torch
from torch import nn

from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.registry import find_checks
from tests.diagnostics.checks.diagnosing import find

IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def make_images(seed, number=4):
    """Batches of 8-bit pictures whose brightness differs, as red as photographs are."""
    generator = torch.Generator().manual_seed(seed)

    def make_batch():
        brightness = 30 * torch.randn(8, 1, 1, 1, generator=generator)
        tone = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) + 10 * torch.randn(8, 3, 1, 1, generator=generator)
        return brightness + tone + 50 * torch.randn(8, 3, 8, 8, generator=generator)

    return [make_batch() for _ in range(number)]


def compare(change):
    return find("BN030", MODEL, make_images(0), test_data=[change(batch) for batch in make_images(1)])


# ---- training images against test images


@pytest.mark.parametrize(
    ("change", "severity", "word"),
    [
        (lambda batch: batch / 255, "error", "scaled"),
        (lambda batch: batch / 58, "error", "scaled"),
        (lambda batch: batch.flip(1), "error", "opposite order"),
        (lambda batch: batch - torch.tensor(IMAGENET_MEAN).view(3, 1, 1), "warning", "standard deviations apart"),
    ],
)
def test_finds_test_images_that_are_prepared_otherwise(change, severity, word):
    (evidence,) = compare(change)

    assert evidence.severity == severity
    assert word in evidence.text


@pytest.mark.parametrize(
    "change",
    [lambda batch: batch, lambda batch: batch.flip(-1), lambda batch: 1.1 * batch + 5, lambda batch: batch[:1]],
)
def test_images_that_differ_by_chance_or_augmentation(change):
    assert not compare(change)


def test_grey_images_have_no_order():
    grey = [batch[:, :1].expand(-1, 3, -1, -1) for batch in make_images(0)]

    assert not find("BN030", MODEL, grey, test_data=[batch.flip(1) for batch in grey])


def test_lists_of_images_and_labels():
    def pair(batch):
        return list(batch), [{} for _ in batch]

    def forward(model, batch):
        return model(torch.stack(batch[0]))

    train = [pair(batch) for batch in make_images(0)]
    test = [pair(batch / 255) for batch in make_images(1)]

    assert len(find("BN030", MODEL, train, test_data=test, forward=forward)) == 1


# ---- what a config says


def examine(**config):
    config = {"INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": IMAGENET_MEAN[::-1], "MODEL.PIXEL_STD": [1.0] * 3} | {
        key.replace("__", "."): value for key, value in config.items()
    }
    return list(find_checks()["BN030"].examine(dataclasses.replace(collect_facts(MODEL), config=config)))


def test_means_in_the_order_of_the_channels_are_healthy():
    assert not examine()
    assert not examine(INPUT__FORMAT="RGB", MODEL__PIXEL_MEAN=IMAGENET_MEAN, MODEL__PIXEL_STD=IMAGENET_STD)
    assert not examine(MODEL__PIXEL_MEAN=[128.0, 128.0, 128.0])
    assert not examine(MODEL__PIXEL_MEAN=[0.0, 0.0, 0.0], MODEL__PIXEL_STD=[255.0] * 3)
    assert not examine(MODEL__PIXEL_MEAN=[0.0] * 5, MODEL__PIXEL_STD=[1.0] * 5)
    assert not examine(MODEL__PIXEL_MEAN=None, MODEL__PIXEL_STD="ones")


@pytest.mark.parametrize(
    "wrong",
    [
        {"INPUT__FORMAT": "RGB"},
        {"MODEL__PIXEL_MEAN": IMAGENET_MEAN, "MODEL__PIXEL_STD": IMAGENET_STD},
        {"MODEL__PIXEL_MEAN": [0.406, 0.456, 0.485], "MODEL__PIXEL_STD": [0.225, 0.224, 0.229]},
    ],
)
def test_finds_means_of_other_pixels(wrong):
    (evidence,) = examine(**wrong)

    assert evidence.severity == "error"
    assert not examine(**{**wrong, **{key.replace(".", "__"): value for key, value in evidence.remedy.keys.items()}})


# ---- images against the first statistics


def test_finds_pixels_in_another_range_than_the_first_statistics():
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        for batch in make_images(0) * 10:
            model(batch / 255)

    (evidence,) = find("BN030", model, make_images(0))

    assert evidence.layers == ("1",)
    assert not find("BN030", model, [batch / 255 for batch in make_images(0)])
    assert not find("BN030", model, [2 * batch / 255 for batch in make_images(0)])  # a near miss


@pytest.mark.parametrize(("scale", "is_found"), [(1, False), (255, True)])
def test_first_statistics_on_their_way(scale, is_found):
    model, data = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1e-3)), make_images(0)
    for batch in data:
        model(batch)

    assert bool(find("BN030", model, [batch / scale for batch in data])) == is_found

import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext import NormSpec, convert_norm, deal_statistics
from bnext.diagnostics.diagnose import collect_facts, observe_batches
from tests.diagnostics.checks.configs import RCNN, describe, examine, list_pairs
from tests.diagnostics.checks.diagnosing import find

STOCK = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
CUT = ("MODEL.BNEXT.ROI_BOX_HEAD.NORMALIZATION_BATCH_SIZE", 8)
NO_MASK = ("MODEL.MASK_ON", False)


@pytest.mark.parametrize(
    ("opts", "images", "workers", "severity", "points"),
    [
        ((), 1, 2, "error", 11.0),
        ((), 1, 1, "error", 11.0),
        ((), 2, 4, "warning", 1.6),
        ((), 3, 1, "note", 0.0),
        (STOCK, 1, 2, "error", 11.0),
        (STOCK, 1, 1, "error", 11.0),
        (CUT, 8, 1, "warning", 11.0),  # the groups of a Ghost BN are RoIs in their order
    ],
)
def test_finds_heads_whose_mini_batches_are_of_few_images_and_its_keys_mend_it(opts, images, workers, severity, points):
    opts = (*opts, "SOLVER.IMS_PER_BATCH", images * workers)
    (evidence,) = examine("BN003", describe(RCNN, *opts, num_workers=workers))

    assert (evidence.severity, evidence.points) == (severity, points)
    heads = {layer.split(".")[1] for layer in evidence.layers}
    assert heads == ({"box_head"} if opts[:2] == CUT else {"box_head", "mask_head"})

    mended = describe(RCNN, *opts, *list_pairs(evidence.remedy), num_workers=workers)
    assert not examine("BN003", mended)
    assert any(norm.is_by_mini_batch and norm.sees_rois for norm in mended.norms)


@pytest.mark.parametrize(
    ("opts", "images", "workers"),
    [
        ((), 5, 1),
        ((*NO_MASK, "MODEL.ROI_BOX_HEAD.NORM", "SyncBN"), 1, 2),
        ((*NO_MASK, "MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE", "features"), 1, 2),
        ((*NO_MASK, "MODEL.BNEXT.ROI_BOX_HEAD.INFERENCE", "mini_batch"), 1, 1),
    ],
)
def test_heads_that_mix_images_are_healthy(opts, images, workers):
    opts = (*opts, "SOLVER.IMS_PER_BATCH", images * workers)
    assert not examine("BN003", describe(RCNN, *opts, num_workers=workers))


def test_a_trained_checkpoint_is_repaired_by_a_command():
    facts = describe(RCNN, "SOLVER.IMS_PER_BATCH", 2, num_workers=2, is_loaded=True)
    (evidence,) = examine("BN003", facts)

    assert evidence.remedy.command.startswith(f"bnext evaluate --config-file {RCNN} MODEL.WEIGHTS trained.pth")
    assert evidence.remedy.command.endswith("MODEL.BNEXT.ROI_MASK_HEAD.INFERENCE mini_batch")


class Crops(nn.Module):
    """Sixteen samples of each image, which share much with one another, or nothing."""

    def __init__(self, shared):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.shared = shared

    def forward(self, images):
        generator = torch.Generator().manual_seed(int(images.abs().sum() * 1e3) % 1000)
        noise = torch.randn(len(images), 16, 3, 4, 4, generator=generator)
        return self.head((self.shared * images[:, None] + noise).flatten(0, 1))


def make_images(number=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(number, 3, 1, 1, generator=generator) for _ in range(4)]


def test_finds_samples_of_one_image_that_are_alike():
    (evidence,) = find("BN003", Crops(2.0), make_images())

    assert evidence.severity == "warning"
    assert evidence.layers == ("head.1",)
    assert evidence.numbers["variance_ratio"] > 20
    (evidence,) = find("BN003", Crops(2.0), make_images(2))
    assert evidence.severity == "note"


def test_samples_of_one_image_that_are_as_apart_as_others_are_healthy():
    assert not find("BN003", Crops(0.0), make_images())
    assert not find("BN003", Crops(2.0), make_images(8))


@pytest.mark.parametrize(
    ("data", "severity"),
    [(make_images(), "note"), (make_images()[:1] * 4, "error")],  # from one image nothing is known
)
def test_rois_that_are_not_alike_are_a_note(data, severity):
    facts = observe_batches(collect_facts(Crops(0.0)), Crops(0.0), data)
    facts = dataclasses.replace(facts, norms=tuple(dataclasses.replace(n, sees_rois=True) for n in facts.norms))

    assert [evidence.severity for evidence in examine("BN003", facts)] == [severity]


@pytest.mark.parametrize("num_workers", [None, 4])
def test_its_call_mends_any_model(num_workers):
    def look(model):
        facts = observe_batches(collect_facts(model), model, make_images())
        training = dataclasses.replace(facts.training, num_workers=num_workers)
        return examine("BN003", dataclasses.replace(facts, training=training))

    model = Crops(2.0)
    exec(look(model)[0].remedy.call, {"bnext": bnext, "model": model})

    assert not look(model)
    dealt = Crops(2.0)
    convert_norm(dealt, {"": NormSpec(workers="all")})
    deal_statistics(dealt.head, num_groups=2)
    assert not look(dealt)  # the RoIs of all workers are mixed, however many they are

import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext import NormSpec
from bnext.diagnostics.collecting.read_norms import read_norms
from bnext.diagnostics.facts import Facts, Population, TrainingFacts
from bnext.layers import BatchNorm2d
from tests.diagnostics.checks.configs import RETINANET, describe, examine, list_pairs
from tests.diagnostics.checks.diagnosing import find

GHOST = ("MODEL.BNEXT.RESNETS.NORMALIZATION_BATCH_SIZE",)


def make(norm=None):
    return nn.Sequential(nn.Conv2d(3, 32, 1), norm or nn.BatchNorm2d(32))


def describe_model(model, images, workers=None):
    return Facts(read_norms(model), training=TrainingFacts(workers, images), is_training=model.training)


@pytest.mark.parametrize(
    ("images", "severity"), [(1, "error"), (2, "warning"), (4, "warning"), (5, "note"), (8, "note"), (9, None)]
)
def test_by_the_number_of_samples(images, severity):
    found = find("BN008", make(), [torch.zeros(images, 3, 8, 8)])

    assert [evidence.severity for evidence in found] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("norm", "images", "workers", "is_found"),
    [
        (nn.SyncBatchNorm(32), 2, 8, False),
        (nn.SyncBatchNorm(32), 2, 2, True),
        (nn.SyncBatchNorm(32), 2, None, False),  # nobody knows
        (BatchNorm2d(32, NormSpec(normalization_batch_size=4)), 64, 1, True),
        (nn.GroupNorm(32, 32), 1, 1, False),
        (BatchNorm2d(32, NormSpec(frozen="both")), 1, 1, False),
        (nn.BatchNorm2d(32).eval(), 1, 1, False),
        (nn.BatchNorm2d(32), None, 1, False),
    ],
)
def test_workers_and_groups_count(norm, images, workers, is_found):
    assert bool(examine("BN008", describe_model(make(norm), images, workers))) is is_found


def test_a_model_for_inference_has_no_mini_batch():
    assert not find("BN008", make().eval(), [torch.zeros(1, 3, 8, 8)])


def test_samples_of_an_image_are_another_check():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(images.repeat(6, 1, 1, 1))

    assert not find("BN008", Frames(), [torch.zeros(1, 3, 8, 8)])


@pytest.mark.parametrize(("workers", "is_trained"), [(8, False), (1, True), (1, False)])
def test_its_call_mends_it(workers, is_trained):
    model = make()
    model[1].num_batches_tracked.fill_(int(is_trained))

    exec(examine("BN008", describe_model(model, 2, workers))[0].remedy.call, {"bnext": bnext, "model": model})

    facts = describe_model(model, 2, workers)
    assert not examine("BN008", facts)
    assert facts.norms[0].is_by_mini_batch is (workers == 8)


def test_a_call_for_some_norms_names_them():
    model = nn.Sequential(*make(), nn.GroupNorm(32, 32), *make())
    (evidence,) = examine("BN008", describe_model(model, 2))

    exec(evidence.remedy.call, {"bnext": bnext, "model": model})

    assert evidence.layers == ("1", "4")
    assert not any(norm.is_batch_norm for norm in read_norms(model))


@pytest.mark.parametrize(
    ("opts", "images", "workers", "keys"),
    [
        ((), 16, 8, {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.RETINANET.NORM": "SyncBN"}),
        (("MODEL.WEIGHTS", "R-18.pkl"), 4, 1, {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.RETINANET.NORM": "GN"}),
        ((*GHOST, 2), 16, 1, {GHOST[0]: 0}),
        ((*GHOST, 2), 32, 2, {GHOST[0]: 0, "MODEL.RESNETS.NORM": "SyncBN"}),
    ],
)
def test_its_keys_mend_a_config(opts, images, workers, keys):
    opts = (*opts, "SOLVER.IMS_PER_BATCH", images)
    (evidence,) = examine("BN008", describe(RETINANET, *opts, num_workers=workers))

    assert keys.items() <= evidence.remedy.keys.items()
    mended = describe(RETINANET, *opts, *list_pairs(evidence.remedy), num_workers=workers)
    assert not examine("BN008", mended)


def test_virtual_images_count():
    opts = ("SOLVER.IMS_PER_BATCH", 4)
    assert examine("BN008", describe(RETINANET, *opts))
    assert not examine("BN008", describe(RETINANET, *opts, "SOLVER.BNEXT.VIRTUAL_IMAGES", 12))


def test_what_it_does_not_know_is_no_fault():
    facts = describe_model(nn.Sequential(nn.LazyBatchNorm2d(), nn.Linear(2, 2)), 0)
    strange = dataclasses.replace(facts.norms[0], populations=(Population("", torch.ones(0), torch.ones(0)),))

    assert examine("BN008", dataclasses.replace(facts, norms=(strange,), training=None)) == []

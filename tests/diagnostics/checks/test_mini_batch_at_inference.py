import pytest
import torch
from torch import nn

import bnext
from bnext import NormSpec
from bnext.layers import BatchNorm2d
from tests.diagnostics.checks.configs import RCNN, RETINANET, describe, examine, list_pairs
from tests.diagnostics.checks.diagnosing import find


def make(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm)


def make_data():
    return [torch.randn(16, 3, 4, 4) for _ in range(2)]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, track_running_stats=False),
        BatchNorm2d(4, NormSpec(inference="mini_batch")),
        BatchNorm2d(4, NormSpec(inference="mini_batch", population="none")),
    ],
)
def test_finds_norms_that_have_or_use_no_population(norm):
    model = make(norm)

    (evidence,) = find("BN034", model)

    assert (evidence.severity, evidence.layers) == ("warning", ("1",))
    exec(evidence.remedy.call, {"bnext": bnext, "model": model, "data": make_data()})
    assert not find("BN034", model)
    assert model[1].running_mean.abs().max() > 0


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)])
def test_norms_that_need_no_other_sample_are_healthy(norm):
    assert not find("BN034", make(norm))
    assert not find("BN034", make(norm).eval())


def test_finds_norms_that_train_within_a_model_in_evaluation_mode():
    model = make(nn.BatchNorm2d(4)).eval()
    model[1].train()

    (evidence,) = find("BN034", model)

    exec(evidence.remedy.call, {"model": model})
    assert not find("BN034", model)


def test_samples_of_one_image_are_a_batch_of_their_own():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm2d(3, NormSpec(inference="mini_batch"))

        def forward(self, images):
            return self.norm(images.repeat(4, 1, 1, 1))

    assert not find("BN034", Crops(), make_data())
    assert not examine(
        "BN034", describe(RCNN, "MODEL.MASK_ON", False, "MODEL.BNEXT.ROI_BOX_HEAD.INFERENCE", "mini_batch")
    )


def test_its_keys_mend_a_config():
    opts = ("MODEL.BNEXT.RESNETS.INFERENCE", "mini_batch", "MODEL.BNEXT.RESNETS.POPULATION", "none")
    (evidence,) = examine("BN034", describe(RETINANET, *opts, is_loaded=True))

    assert evidence.remedy.command.startswith("bnext reestimate")
    assert not examine("BN034", describe(RETINANET, *opts, *list_pairs(evidence.remedy)))

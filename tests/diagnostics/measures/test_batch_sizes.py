"""What a norm normalizes together, from the facts alone."""

import dataclasses

import pytest
import torch
from torch import nn

from bnext import LevelBatchNorm2d, NormSpec, deal_statistics
from bnext.diagnostics.collecting.read_norms import read_norms
from bnext.diagnostics.diagnose import collect_facts, observe_batches
from bnext.diagnostics.facts import Facts, ForwardFacts, TrainingFacts
from bnext.diagnostics.measures.batch_sizes import count_elements, count_together
from bnext.layers import BatchNorm2d, Shuffled


def observe(model, *sizes, **training):
    data = [torch.zeros(size) for size in sizes]
    facts = observe_batches(collect_facts(model), model, data)
    return dataclasses.replace(facts, training=dataclasses.replace(facts.training, **training))


def count(facts, index=0):
    norm = facts.norms[index]
    return count_together(facts, norm), count_elements(facts, norm)


@pytest.mark.parametrize(
    ("norm", "together"),
    [
        (nn.BatchNorm2d(3), 6),
        (BatchNorm2d(3), 6),
        (BatchNorm2d(3, NormSpec(workers="all")), 24),
        (BatchNorm2d(3, NormSpec(workers=2)), 12),
        (nn.SyncBatchNorm(3), 24),
        (BatchNorm2d(3, NormSpec(normalization_batch_size=4)), 3),
        (BatchNorm2d(3, NormSpec(normalization_batch_size=8)), 6),
        (nn.GroupNorm(1, 3), None),
        (BatchNorm2d(3, NormSpec(frozen="both")), None),
    ],
)
def test_samples_and_elements_of_a_mini_batch(norm, together):
    facts = Facts(read_norms(nn.Sequential(norm)), training=TrainingFacts(4, 6))

    assert count(facts) == (together, None)

    facts = observe(nn.Sequential(nn.BatchNorm2d(3)), (6, 3, 2, 5), num_workers=4)
    facts = dataclasses.replace(facts, norms=read_norms(nn.Sequential(norm)))
    assert count(facts) == (together, None if together is None else (10 * together, 10 * together))


def test_nothing_is_known_without_a_batch_or_workers():
    assert count(Facts(read_norms(nn.BatchNorm2d(3)))) == (None, None)
    assert count(Facts(read_norms(nn.SyncBatchNorm(3)), training=TrainingFacts(None, 6))) == (None, None)


def test_a_norm_that_sees_other_samples_than_images():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(images.repeat(8, 1, 1, 1))

    assert count(observe(Crops(), (2, 3, 1, 1))) == (16, (16, 16))


def test_levels_are_one_mini_batch_or_several():
    class Head(nn.Module):
        def __init__(self, statistics):
            super().__init__()
            self.norm = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec(statistics=statistics))

        def forward(self, images):
            return self.norm({"p3": images, "p4": images[..., ::2, ::2]})

    assert count(observe(Head("shared"), (2, 3, 4, 4))) == (2, (40, 40))
    assert count(observe(Head("per_level"), (2, 3, 4, 4))) == (2, (8, 32))


def test_the_groups_of_a_deal():
    model = nn.Sequential(nn.Sequential(BatchNorm2d(3, NormSpec(workers="all"))), Shuffled(nn.BatchNorm2d(3)))
    deal = deal_statistics(model[0], num_groups=8)

    dealt, moved = read_norms(model)
    assert (dealt.shuffle, dealt.num_groups, moved.shuffle) == ("statistics", 8, "features")
    facts = Facts((dealt, moved), training=TrainingFacts(num_workers=4, images_per_worker=6))
    assert count(facts, 0)[0] == 3
    assert count(facts, 1)[0] == 6

    deal.remove()
    assert read_norms(model)[0].shuffle == ""


def test_rois_are_those_of_the_config_and_not_of_noise():
    model = nn.Sequential(nn.BatchNorm2d(3))
    call = observe(model, (1, 3, 7, 7)).forwards[0].calls
    noise = ForwardFacts(1, "population", call, is_noise=True, image_size=(100, 100))
    (norm,) = read_norms(model)

    images = Facts(
        (norm,),
        forwards=(noise,),
        config={"INPUT.MIN_SIZE_TRAIN": (200, 300)},
        training=TrainingFacts(1, 2),
    )
    assert count(images) == (2, (2 * 196, 2 * 196))

    rois = dataclasses.replace(images, norms=(dataclasses.replace(norm, sees_rois=True, place="ROI_MASK_HEAD"),))
    assert count(rois) == (None, None)
    config = {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512, "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25}
    assert count(dataclasses.replace(rois, config=config)) == (256, (256 * 49, 256 * 49))

"""Advice on norms: the right one first, with keys that choose it, and whether it is chosen already."""

import dataclasses

import pytest
from detectron2.modeling import build_model
from torch import nn

from bnext import load_config
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import TrainingFacts, WeightsFacts
from bnext.diagnostics.recommend import recommend
from bnext.heads.doctor_facts import add_config_facts


def describe(file, *opts, num_workers=1, weights=""):
    cfg = load_config(file, ["MODEL.DEVICE", "meta", *opts])
    model = build_model(cfg)
    facts = add_config_facts(collect_facts(model), cfg, model, num_workers)
    facts = dataclasses.replace(facts, weights=WeightsFacts(weights))
    return {advice.place: advice for advice in recommend(facts)}


DIGITS = "Digits-Detection/retinanet_R_18_FPN.yaml"


def test_a_head_of_levels_is_told_rows_and_what_it_has():
    head = describe(DIGITS, "MODEL.RETINANET.NORM", "SyncBN")["RETINANET"]

    assert "levels" in head.situation
    assert [option.norm for option in head.options if option.is_chosen] == [
        "BN of each level, with a population for each (row 4)"
    ]
    assert all(option.source for option in head.options)


def test_keys_of_advice_choose_it():
    first = describe(DIGITS)["RETINANET"].options[1]
    pairs = [str(word) for pair in first.keys.items() for word in pair]

    assert describe(DIGITS, *pairs)["RETINANET"].options[1].is_chosen


@pytest.mark.parametrize(
    ("images", "workers", "weights", "first"),
    [
        (2, 1, "R-50.pkl", "FrozenBN"),
        (2, 8, "", "SyncBN"),
        (32, 1, "", "BN"),
        (2, 1, "", "GroupNorm"),  # frozen initial statistics would normalize nothing
        (2, 8, "R-50.pkl", "FrozenBN"),
    ],
)
def test_a_backbone_by_batch_and_weights(images, workers, weights, first):
    facts = collect_facts(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    training = TrainingFacts(workers, images)
    facts = dataclasses.replace(facts, training=training, weights=WeightsFacts(weights))

    (advice,) = recommend(facts)

    assert advice.options[0].norm == first


@pytest.mark.parametrize(("workers", "first"), [(1, "BN with each image's RoIs"), (8, "SyncBN")])
def test_a_roi_head_by_workers(workers, first):
    facts = collect_facts(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    norms = tuple(dataclasses.replace(norm, sees_rois=True) for norm in facts.norms)
    facts = dataclasses.replace(facts, norms=norms, training=TrainingFacts(workers, 1))

    assert recommend(facts)[0].options[0].norm.startswith(first)


def test_accumulation_does_not_help():
    facts = collect_facts(nn.BatchNorm2d(4))
    facts = dataclasses.replace(facts, training=TrainingFacts(1, 1, accumulation=8))

    assert "does not help" in recommend(facts)[-1].options[0].limit


def test_nothing_is_said_where_nothing_is_known():
    assert recommend(collect_facts(nn.BatchNorm2d(4))) == ()


def test_a_synchronized_norm_on_one_worker_is_the_plain_one():
    options = describe(DIGITS, "MODEL.RESNETS.NORM", "SyncBN", "SOLVER.IMS_PER_BATCH", "16")["RESNETS"].options

    assert [option.norm for option in options if option.is_chosen] == ["BN"]

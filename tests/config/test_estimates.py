"""Config keys of TEST.BNEXT: every value or combination that is refused, by key, value and remedy."""

from typing import get_args

import pytest

pytest.importorskip("detectron2")

from bnext.config.check import check_config
from bnext.config.estimates import ESTIMATORS
from bnext.statistics.recompute import Estimator
from tests.config.test_check import make_whole, refusal

PRECISE, LOSS, SMART = "TEST.BNEXT.PRECISE_BN", "TEST.BNEXT.VALIDATION_LOSS", "TEST.BNEXT.SMART_BATCH_NORM"
ENABLED = {"TEST.PRECISE_BN.ENABLED": True}


def test_estimators_are_those_that_there_are():
    assert get_args(Estimator) == ESTIMATORS


@pytest.mark.parametrize(
    "pairs",
    [
        {},
        {**ENABLED, f"{PRECISE}.TOLERANCE": 0.01, f"{PRECISE}.BEFORE_CHECKPOINTS": False},
        {**ENABLED, f"{PRECISE}.ESTIMATOR": "layer_by_layer"},
        {SMART: True, f"{PRECISE}.TOLERANCE": 0.01, f"{PRECISE}.ESTIMATOR": "mean_of_batches"},
        {SMART: True, "SOLVER.BNEXT.FREEZE.ITER": 5, "SOLVER.BNEXT.FREEZE.WHAT": "affine"},
        {"DATASETS.TEST": ("val",), f"{LOSS}.PERIOD": 5, f"{LOSS}.NUM_BATCHES": 2, f"{LOSS}.STATISTICS": "mini_batch"},
    ],
)
def test_what_makes_sense(pairs):
    check_config(make_whole(**pairs))


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_a_tolerance_is_a_number_of_0_or_more(value):
    assert refusal(make_whole(**ENABLED, **{f"{PRECISE}.TOLERANCE": value})) == (
        f"{PRECISE}.TOLERANCE must be 0 (none) or above; got {value} (config). Use 0.01 for 1 %."
    )


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        (f"{PRECISE}.ESTIMATOR", "median", "'pooled', 'mean_of_batches', 'layer_by_layer', 'moving_average'"),
        (f"{LOSS}.STATISTICS", "frozen", "'population', 'mini_batch'"),
    ],
)
def test_choices(key, value, choices):
    assert refusal(make_whole(**{key: value})) == (
        f"{key} must be one of {choices}; got {value!r} (config). Choose one of them."
    )


@pytest.mark.parametrize(
    ("key", "value"), [("TOLERANCE", 0.01), ("ESTIMATOR", "mean_of_batches"), ("BEFORE_CHECKPOINTS", False)]
)
def test_a_key_of_a_re_estimation_needs_one(key, value):
    assert refusal(make_whole(**{f"{PRECISE}.{key}": value})) == (
        f"{PRECISE}.{key} must keep its default where TEST.PRECISE_BN does not re-estimate; got {value!r} "
        f"(TEST.PRECISE_BN.ENABLED is False). Set TEST.PRECISE_BN.ENABLED to True, or remove the key."
    )


def test_the_one_estimate_of_smart_batch_norm_is_before_the_last_checkpoint_only():
    assert "BEFORE_CHECKPOINTS must keep its default" in refusal(
        make_whole(**{SMART: True, f"{PRECISE}.BEFORE_CHECKPOINTS": False})
    )


def test_layer_by_layer_has_no_tolerance():
    pairs = {f"{PRECISE}.TOLERANCE": 0.5, f"{PRECISE}.ESTIMATOR": "layer_by_layer"}
    assert refusal(make_whole(**ENABLED, **pairs)) == (
        f"{PRECISE}.TOLERANCE must be 0 where statistics are estimated layer by layer; got 0.5 ({PRECISE}.ESTIMATOR is "
        f"'layer_by_layer'): every layer sees the same images. Remove one of the two."
    )


@pytest.mark.parametrize(
    ("pairs", "key", "reason"),
    [
        (ENABLED, "TEST.PRECISE_BN.ENABLED", "no evaluation but the last uses the population"),
        ({"SOLVER.BNEXT.FREEZE.ITER": 0}, "SOLVER.BNEXT.FREEZE.ITER", "frozen statistics normalize in training"),
    ],
)
def test_smart_batch_norm_excludes(pairs, key, reason):
    assert refusal(make_whole(**{SMART: True}, **pairs)) == (
        f"{SMART} must be False with {key}; got True (config): {reason}. Remove one of the two."
    )


@pytest.mark.parametrize(("key", "meaning"), [("PERIOD", "never"), ("NUM_BATCHES", "all")])
def test_numbers_of_a_validation_loss_are_not_negative(key, meaning):
    assert refusal(make_whole(**{f"{LOSS}.{key}": -1})) == (
        f"{LOSS}.{key} must be 0 ({meaning}) or more; got -1 (config). Use 0."
    )


@pytest.mark.parametrize(("key", "value"), [("NUM_BATCHES", 3), ("STATISTICS", "mini_batch")])
def test_a_key_of_a_validation_loss_needs_one(key, value):
    assert refusal(make_whole(**{f"{LOSS}.{key}": value})) == (
        f"{LOSS}.{key} must keep its default where no validation loss is computed; got {value!r} ({LOSS}.PERIOD is 0). "
        f"Set {LOSS}.PERIOD, or remove the key."
    )


def test_a_validation_loss_needs_images():
    assert refusal(make_whole(**{f"{LOSS}.PERIOD": 5, "DATASETS.TEST": ()})) == (
        f"{LOSS}.PERIOD must be 0 without images; got 5 (DATASETS.TEST is empty). Name a labelled data set there, or "
        f"set it to 0."
    )


def test_a_re_estimation_needs_batches_which_is_told_before_the_training():
    text = refusal(make_whole(**ENABLED, **{"TEST.PRECISE_BN.NUM_ITER": 0}))
    assert text.startswith("TEST.PRECISE_BN.NUM_ITER must be 1 or more where TEST.PRECISE_BN.ENABLED is True; got 0")

"""Any torch model, measured with several kinds of statistics; and what fails on one worker fails on all."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from bnext.errors import ConfigError, DatasetError, StatisticsError
from bnext.repair import KINDS, compare_kinds, normalizing_evaluation_by_mini_batch
from bnext.repair.compare import failing_alone
from tests.workers import run_workers

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 2


def make_classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()


def measure_mean(model, kind):
    with torch.no_grad():
        return {"mean": float(model[:2](IMAGES).mean())}


def test_every_kind_that_has_data_is_measured_and_the_model_is_as_before():
    model = make_classifier()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    results = compare_kinds(model, {"training": [IMAGES], "test": [IMAGES[:4]]}, measure_mean)

    rows = results["rows"]
    assert list(rows) == [kind for kind in KINDS if kind not in ("per_level", "per_domain")]
    assert abs(rows["precise"]["mean"]) < 1e-5 < abs(rows["moving_average"]["mean"])
    assert rows["mini_batch"]["mean"] == pytest.approx(rows["precise"]["mean"], abs=1e-5)
    assert results["reports"]["adaptive"]["num_samples"] == 4
    assert "domain" in results["not_applicable"]["per_domain"]
    assert "levels" in results["not_applicable"]["per_level"]

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]


def test_a_measure_that_breaks_off_leaves_the_model_as_it_was():
    model = make_classifier()
    before = copy.deepcopy(model.state_dict())

    def measure(model, kind):
        model.train()
        raise OSError("on purpose")

    for kind in ("precise", "mini_batch", "moving_average"):
        with pytest.raises(OSError, match="on purpose"):
            compare_kinds(model, {"training": [IMAGES]}, measure, [kind])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not model.training


def test_nothing_that_can_be_measured_is_refused():
    def measure(model, kind):
        raise ValueError("no labels")

    with pytest.raises(StatisticsError, match="no labels"):
        compare_kinds(make_classifier(), {}, measure, ["moving_average"])
    with pytest.raises(ConfigError, match="training"):
        compare_kinds(make_classifier(), {}, measure_mean, ["precise"])
    with pytest.raises(ConfigError, match="kinds"):
        compare_kinds(make_classifier(), {}, measure_mean, ["best"])


def test_torch_norms_are_normalized_by_the_mini_batch_too():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)).eval()
    norms = list(model)
    before = [norm.running_mean for norm in norms]
    images = torch.randn(4, 3, 5, 5) * 3 + 7
    expected = nn.functional.batch_norm(images, None, None, training=True)
    with contextlib.suppress(OSError), normalizing_evaluation_by_mini_batch(model):
        torch.testing.assert_close(norms[0](images), expected)
        raise OSError
    assert all(norm.running_mean is mean for norm, mean in zip(norms, before, strict=True))
    assert set(model.state_dict()) >= {"0.running_mean", "1.running_var"}


def fail_on_one_of_two_workers(rank):
    def fail(model):
        with failing_alone(model) as failures:
            if rank == 1:
                raise ValueError("on\npurpose.")
        return failures

    failures = fail(nn.BatchNorm2d(3).eval())
    if rank == 1:
        with pytest.raises(ValueError, match="on"):  # the other one may wait in a norm
            fail(nn.SyncBatchNorm(3).eval())
    return failures


def test_a_kind_that_fails_on_one_worker_fails_on_all():
    assert run_workers(fail_on_one_of_two_workers, 2) == [["on purpose"], ["on purpose"]]


def test_a_picture_that_is_gone_is_no_property_of_a_kind():
    def measure(model, kind):
        if kind.name == "mini_batch":
            raise DatasetError("The image files of data set 'mine' must exist; got 1 of 6 missing.")
        return {"AP": 1.0}

    with pytest.raises(DatasetError, match="missing"):
        compare_kinds(nn.BatchNorm2d(4).eval(), {}, measure, ["moving_average", "mini_batch"])

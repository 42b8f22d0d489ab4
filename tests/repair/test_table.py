"""The table of kinds of statistics for any torch model, by numbers of the caller's own."""

import copy
import json

import pytest
import torch

import bnext
from bnext.errors import ConfigError, StatisticsError
from tests.repair.heads import LoopingDetector, make_images, settle

IMAGES = make_images()


def make_model():
    torch.manual_seed(0)
    return settle(LoopingDetector(), IMAGES, times=3)


@pytest.fixture(scope="module")
def target():
    """Outputs of the training, where each level was normalized by its own mini-batch."""
    model = make_model().train()
    with torch.no_grad():
        return model(IMAGES[0])


def test_the_table_shows_what_a_repair_is_worth(target):
    model = make_model()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]

    def evaluate(model):
        assert not model.training
        with torch.no_grad():
            pairs = zip(model(IMAGES[0]), target, strict=True)
            return {"error": sum(torch.nn.functional.mse_loss(*pair) for pair in pairs), "none": None}

    table = bnext.compare_statistics(model, IMAGES, evaluate, test_loader=IMAGES[:1])
    assert list(table.rows) == ["moving_average", "precise", "mean_of_batches", "mini_batch", "per_level", "adaptive"]
    errors = {kind: row["error"] for kind, row in table.rows.items()}
    assert errors["per_level"] < errors["precise"] / 5
    assert errors["mini_batch"] == pytest.approx(0, abs=1e-9)
    assert table.differences["per_level"]["error"] == pytest.approx(errors["per_level"] - errors["moving_average"])
    assert "re-estimated per level" in str(table)
    assert json.loads(json.dumps(table.as_dict()))["rows"]["precise"]["none"] is None

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert not model._forward_pre_hooks
    bnext.repair(model, IMAGES)
    assert evaluate(model)["error"] < errors["precise"] / 5


def test_an_evaluation_of_another_model_gives_no_row():
    """Numbers of the model that a script has at hand would say that statistics of each level change nothing."""
    model = make_model()

    def evaluate(_):
        return {"mean": float(model(IMAGES[0])[0].mean())}

    table = bnext.compare_statistics(model, IMAGES, evaluate, ["moving_average", "per_level"])
    assert list(table.rows) == ["moving_average"]
    assert "evaluate must run the model" in table.not_applicable["per_level"]

    def evaluate_deepcopy(model):
        return {"mean": float(copy.deepcopy(model)(IMAGES[0])[0].mean())}

    table = bnext.compare_statistics(model, IMAGES, evaluate_deepcopy, ["per_level"])
    assert "per_level" in table.rows


def test_a_loss_that_is_infinite_is_a_number():
    table = bnext.compare_statistics(make_model(), IMAGES, lambda model: {"loss": torch.inf}, ["precise"])
    assert table.rows == {"precise": {"loss": torch.inf}}
    assert table.as_dict()["rows"] == {"precise": {"loss": None}}


def test_a_model_without_levels_has_no_row_of_them():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    table = bnext.compare_statistics(model, IMAGES, lambda model: {"mean": float(model(IMAGES[0]).mean())})
    assert "several levels" in table.not_applicable["per_level"]
    assert abs(table.rows["precise"]["mean"]) < abs(table.rows["moving_average"]["mean"])
    assert "per_level does not apply" in str(table)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"evaluate": lambda model: 0.5}, "numbers by name"),
        ({"evaluate": lambda model: {}}, "numbers by name"),
        ({"evaluate": lambda model: {"AP": "high"}}, "numbers by name"),
        ({"evaluate": lambda model: {"AP": torch.ones(2)}}, "numbers by name"),
        ({"kinds": "precise"}, "kinds .*'precise'"),
        ({"kinds": []}, "kinds"),
        ({"loader": iter(IMAGES)}, "gone through again"),
        ({"loader": IMAGES[0]}, "loader"),
        ({"kinds": ["best"]}, "kinds"),
        ({"kinds": ["adaptive"]}, "kinds"),
        ({"entry": "nothing"}, "entry"),
    ],
)
def test_what_cannot_be_compared_is_refused(replaced, message):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    arguments = {"loader": IMAGES, "evaluate": lambda model: {"AP": 1.0}, **replaced}
    with pytest.raises((ConfigError, StatisticsError), match=message):
        bnext.compare_statistics(model, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model._forward_pre_hooks

import pytest
import torch
from torch import nn

import bnext
from bnext import LevelBatchNorm2d, NormSpec
from tests.diagnostics.checks.counting import Net, find_in_training, make_image
from tests.diagnostics.checks.diagnosing import find


class Skipping(Net):
    """Its second block is left out in training."""

    def forward(self, image):
        return super().forward(image) if not self.training else self.first(image)


def make_counted(first, second, momentum=0.1):
    model = Net()
    for block, number in ((model.first, first), (model.second, second)):
        block[1].num_batches_tracked.fill_(number)
        block[1].momentum = momentum
    return model


def test_finds_a_layer_that_the_training_skips():
    (evidence,) = find_in_training("BN016", Skipping())

    assert (evidence.severity, evidence.layers) == ("warning", ("second.1",))


@pytest.mark.parametrize(("model", "num_steps"), [(Net(), 20), (Skipping(), 19)])
def test_reached_layers_and_few_steps_say_nothing(model, num_steps):
    assert not find_in_training("BN016", model, num_steps)


@pytest.mark.parametrize(("number", "severity"), [(9, "warning"), (28, "note")])
def test_finds_averages_that_still_remember_their_initial_values(number, severity):
    (evidence,) = find("BN016", make_counted(5000, number))

    assert (evidence.severity, evidence.layers) == (severity, ("second.1",))
    assert evidence.numbers["initial_weight"] == pytest.approx(0.9**number)


@pytest.mark.parametrize(
    "model",
    [
        make_counted(5000, 30),  # forgotten
        make_counted(90, 20),  # the others have no more
        make_counted(20, 20),  # re-estimated
        make_counted(5000, 0),  # never updated is another finding
        make_counted(5000, 9, momentum=None),
        make_counted(5000, 1, momentum=0.99),
    ],
)
def test_other_counters_say_nothing(model):
    assert not find("BN016", model)


def test_the_rarest_level_counts():
    norm = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec(statistics="per_level", population="per_level"))
    model = nn.Sequential(norm, nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    for part, number in zip(
        (norm.population_state("p3"), norm.population_state("p4"), *model[1:]), (800, 5, 800, 800), strict=True
    ):
        part.num_batches_tracked.fill_(number)

    (evidence,) = find("BN016", model)
    assert (evidence.layers, evidence.numbers["updates"]) == (("0",), 5)


def test_nothing_is_left_after_its_remedy():
    model, data = make_counted(5000, 9), [make_image() for _ in range(8)]
    torch.manual_seed(0)
    call = find("BN016", model)[0].remedy.call
    exec(call, {"model": model.eval(), "data": data, "bnext": bnext})

    assert not find("BN016", model)

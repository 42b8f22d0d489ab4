import dataclasses

import pytest
from torch import nn

import bnext
from bnext.diagnostics.checks.updated_twice import CHECK
from bnext.diagnostics.diagnose import collect_facts, observe_batches
from bnext.diagnostics.facts import TrainingFacts, WeightsFacts
from tests.diagnostics.checks.counting import Net, find_in_training, make_image


def examine_file(model, iteration, training=None, data=None):
    facts = collect_facts(model)
    facts = observe_batches(facts, model, data) if data else facts
    weights = WeightsFacts("a.pth", is_loaded=True, iteration=iteration)
    return list(CHECK.examine(dataclasses.replace(facts, weights=weights, training=training)))


def make_counted(first, second):
    model = Net()
    for block, number in ((model.first, first), (model.second, second)):
        block[1].num_batches_tracked.fill_(number)
    return model


def test_finds_a_norm_that_a_checkpoint_runs_again():
    (evidence,) = find_in_training("BN015", Net(is_checkpointed=True), num_forwards=2)

    assert (evidence.severity, evidence.layers) == ("warning", ("second.1",))
    assert evidence.numbers["updates"] == 2


def test_nothing_is_left_after_its_remedy():
    model = Net(is_checkpointed=True)
    exec(find_in_training("BN015", model)[0].remedy.call, {"model": model, "bnext": bnext})

    assert not find_in_training("BN015", model)


@pytest.mark.parametrize("model", [Net(), Net(num_calls=2), Net(num_calls=2).eval()])
def test_calls_and_micro_batches_are_no_second_updates(model):
    assert not find_in_training("BN015", model, num_forwards=2)


def test_every_update_of_several_calls_may_be_doubled():
    (evidence,) = find_in_training("BN015", Net(is_checkpointed=True, num_calls=3))

    assert evidence.numbers["updates"] == 2


def test_finds_it_in_the_counters_of_a_file():
    (evidence,) = examine_file(make_counted(1000, 2000), 999, data=[make_image()])

    assert (evidence.severity, evidence.layers) == ("warning", ("second.1",))


def test_of_a_file_alone_it_is_a_note():
    (evidence,) = examine_file(make_counted(1000, 2000), 999)
    assert evidence.severity == "note", "who knows how often it is called?"

    (evidence,) = examine_file(make_counted(2000, 2000), 999, data=[make_image()])
    assert evidence.severity == "note", "it may have begun with weights of another training"


@pytest.mark.parametrize(
    ("counters", "iteration", "training"),
    [
        ((1000, 1000), 999, None),
        ((1000, 1900), 999, None),  # no multiple
        ((2000, 2000), 999, TrainingFacts(accumulation=2)),
        ((10, 20), 9, None),
        ((1000, 5000), 999, None),  # a head of five levels
        ((0, 0), 999, None),
    ],
)
def test_other_counters_say_nothing(counters, iteration, training):
    assert not examine_file(make_counted(*counters), iteration, training)


def test_takes_frozen_norms_and_none_at_all():
    model = make_counted(1000, 2000)
    model.second[1].eval()
    assert not examine_file(model, 999)
    assert not examine_file(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3)), 999)

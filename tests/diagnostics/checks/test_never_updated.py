import dataclasses

import pytest
import torch
from torch import nn

import bnext
from bnext.diagnostics.checks.never_updated import CHECK
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Origin, WeightsFacts
from tests.diagnostics.checks.diagnosing import find


def make_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def move(norm):
    norm.bias.data += 0.1


def run(model):
    model(torch.randn(4, 3, 8, 8) + 1)
    return model


def test_finds_statistics_that_were_left_out():
    model = run(make_model())
    model[1].reset_running_stats()
    move(model[1])

    (evidence,) = find("BN013", model)

    assert evidence.severity == "error"
    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"bnext": bnext, "model": model, "data": [torch.randn(4, 3, 8, 8)] * 2})
    assert not find("BN013", model)


def test_finds_statistics_that_were_reset_beside_a_counter_that_was_not():
    model = run(make_model())
    model[1].running_mean.zero_()
    model[1].running_var.fill_(1)
    move(model[1])

    (evidence,) = find("BN013", model)
    assert (evidence.severity, evidence.layers) == ("error", ("1",))


def test_shifts_that_may_have_been_drawn_at_random_are_a_warning():
    model = make_model()
    move(model[1])

    assert [evidence.severity for evidence in find("BN013", model)] == ["warning"]


def test_scales_that_were_drawn_around_0_are_a_note():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32))
    for parameter in model[1].parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))

    (evidence,) = find("BN013", model)
    assert evidence.severity == "note"


def test_new_norms_on_trained_ones_are_healthy():
    model = run(make_model())
    move(model[1])
    model[3].reset_running_stats()
    model[3].weight.data.normal_(1, 0.02)  # as some initialize it

    assert not find("BN013", model)
    assert not find("BN013", make_model())


def test_a_level_that_never_came_is_found():
    model = nn.Sequential(bnext.LevelBatchNorm2d(3, ("p3", "p4"), bnext.NormSpec.from_table5_row(4)))
    move(model[0])
    model({"p3": torch.randn(4, 3, 8, 8)})

    (evidence,) = find("BN013", model)

    assert "p4" in evidence.text


def test_an_affine_from_a_file_without_statistics_is_found():
    model = make_model()
    model[1].weight.data += 0.1
    weights = WeightsFacts("gn.pth", is_loaded=True, without_statistics=("1",))
    facts = dataclasses.replace(collect_facts(model), weights=weights)

    (evidence,) = CHECK.examine(dataclasses.replace(facts, origin=Origin("config", "a.yaml", weights="gn.pth")))

    assert evidence.layers == ("1",)
    assert evidence.remedy.command.startswith("bnext reestimate --config-file a.yaml")
    folded = dataclasses.replace(weights, folded=("1",))
    assert not list(CHECK.examine(dataclasses.replace(facts, weights=folded)))  # of which another check speaks


@pytest.mark.parametrize(("num_updates", "number"), [(0, 1), (None, 0)])
def test_a_checkpoint_alone_may_be_of_frozen_norms(num_updates, number):
    """Whose affine does all, and which nobody counts."""
    model = make_model()
    move(model[1])
    facts = dataclasses.replace(collect_facts(model), origin=Origin("checkpoint", "CONFIG.yaml", weights="model.pth"))
    norms = []
    for norm in facts.norms:
        populations = tuple(dataclasses.replace(one, num_updates=num_updates) for one in norm.populations)
        norms.append(dataclasses.replace(norm, populations=populations))

    assert len(list(CHECK.examine(dataclasses.replace(facts, norms=tuple(norms))))) == number


@pytest.mark.parametrize(("is_run", "severity"), [(False, "error"), (True, "warning")])
def test_momentum_0_never_updates(is_run, severity):
    model = make_model(momentum=0.0)
    if is_run:
        model[1].running_mean += 1

    (evidence,) = find("BN013", model)

    assert evidence.severity == severity
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN013", model)


def test_a_small_momentum_and_a_cumulative_one_are_healthy():
    assert not find("BN013", make_model(momentum=0.001))
    assert not find("BN013", make_model(momentum=None))


def test_frozen_norms_are_another_matter():
    model = make_model(momentum=0.0)
    move(model[1])
    model[1].eval()

    assert not find("BN013", model)

import dataclasses

import pytest
import torch

import bnext
from bnext.diagnostics.checks.changed_between_steps import CHECK
from bnext.diagnostics.facts import Facts, Origin, StepFacts
from tests.diagnostics.checks.counting import Net, find_in_training, make_image


def test_finds_a_validation_in_training_mode():
    model = Net()

    def validate():
        with torch.no_grad():
            model(make_image())

    (evidence,) = find_in_training("BN025", model, num_steps=3, between=validate)

    assert (evidence.severity, set(evidence.layers)) == ("warning", {"first.1", "second.1"})
    assert evidence.numbers["iteration"] == 0


@pytest.mark.parametrize("way", ["remedy", "evaluation mode"])
def test_a_forward_that_changes_nothing_is_none(way):
    model = Net()

    def validate():
        if way == "remedy":
            exec(evidence.remedy.call, {"model": model, "batch": make_image(), "bnext": bnext})
            return
        model.eval()(make_image())
        model.train()

    (evidence,) = CHECK.examine(Facts((), steps=StepFacts(1, 1, {}, {"a": 0})))
    assert not find_in_training("BN025", model, num_steps=3, between=validate)


def test_says_before_the_first_step_and_names_the_key_of_a_config():
    facts = Facts((), steps=StepFacts(3, 3, {}, {"a": -1, "b": 2}), origin=Origin("config"))
    (evidence,) = CHECK.examine(facts)

    assert "before the first step" in evidence.text
    assert "TEST.BNEXT.VALIDATION_LOSS.PERIOD" in evidence.remedy.keys
    assert not list(CHECK.examine(dataclasses.replace(facts, steps=None)))

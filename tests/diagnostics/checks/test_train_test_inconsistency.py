import dataclasses
import math

import pytest
import torch
from torch import nn

from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import EvaluationFacts
from bnext.diagnostics.registry import find_checks
from tests.diagnostics.checks.diagnosing import find

FACTS = collect_facts(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


def examine(**kinds):
    """What is seen of scores or losses."""
    facts = dataclasses.replace(FACTS, evaluation=EvaluationFacts(**kinds))
    return list(find_checks()["BN021"].examine(facts))


def rate(population, mini_batch, precise):
    return {"population": population, "mini_batch": mini_batch, "precise": precise}


@pytest.mark.parametrize(
    ("ap", "severity", "word"),
    [
        (rate(18.9, 38.0, 38.5), "error", "running statistics are wrong"),
        (rate(36.5, 37.5, 38.5), "warning", "running statistics are wrong"),
        (rate(67.5, 74.0, 67.6), "warning", "one population does not describe"),  # normalization batch size 2
        (rate(30.7, 41.5, 30.9), "error", "one population does not describe"),  # RoIs of one image
    ],
)
def test_finds_the_gap_that_is_there(ap, severity, word):
    (evidence,) = examine(ap=ap)

    assert evidence.severity == severity
    assert word in evidence.text


@pytest.mark.parametrize(
    "ap",
    [
        rate(39.1, 36.0, 39.2),  # mini-batches are worse: healthy
        rate(76.3, 75.3, 76.4),  # ResNet-50, batch 256
        rate(38.2, 38.9, 38.6),  # less than chance
        rate(1.0, 1.9, 1.9),  # nothing is learned yet
        {"population": 39.0},
        {},
    ],
)
def test_healthy_scores(ap):
    assert not examine(ap=ap)


def test_losses_tell_where_there_is_no_score():
    (evidence,) = examine(losses=rate(2.0, 1.1, 1.0))

    assert evidence.severity == "error"
    assert not examine(losses=rate(1.05, 1.3, 1.0))
    assert not examine(losses=rate(0.003, 0.01, 0.002))  # next to nothing
    assert not examine(losses=rate(2.0, 1.1, 1.0), ap=rate(39.0, 38.0, 39.0))  # the score is what counts
    assert examine(losses=rate(math.nan, 1.1, 1.0))


def test_a_model_is_mended_by_the_remedy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    inputs = torch.randn(32, 3, 4, 4)
    labels = (inputs.mean((1, 2, 3)) > 0).long()
    data = [(inputs[start : start + 8], labels[start : start + 8]) for start in range(0, 32, 8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs_of, labels_of in data * 5:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs_of), labels_of).backward()
        optimizer.step()
    model[1].running_mean += 3

    def evaluate(model):
        return 100 * float((model(inputs).argmax(1) == labels).float().mean())

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    options = {"depth": "full", "forward": lambda model, batch: model(batch[0]), "loss": loss, "evaluate": evaluate}
    (evidence,) = find("BN021", model, data, **options)

    assert evidence.severity == "error"
    exec(evidence.remedy.call.replace("data)", "data, forward=forward)"), {"model": model, "data": data, **options})
    assert not find("BN021", model, data, **options)

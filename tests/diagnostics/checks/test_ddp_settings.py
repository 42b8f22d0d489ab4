import dataclasses

import pytest
import torch
from torch import nn

from bnext.diagnostics.diagnose import collect_facts, observe_batches
from bnext.diagnostics.facts import StepFacts, TrainingFacts
from tests.diagnostics.checks.configs import examine

DEFAULT = {"broadcast_buffers": True, "find_unused_parameters": False, "static_graph": False}


def describe(model, steps=None, data=None, **ddp):
    facts = collect_facts(model)
    if data is not None:
        facts = observe_batches(facts, model, data)
    settings = {**DEFAULT, **ddp}
    training = TrainingFacts(num_workers=2, images_per_worker=16, ddp=settings)
    return dataclasses.replace(facts, training=training, steps=steps)


def find(*args, **ddp):
    return [evidence.severity for evidence in examine("BN028", describe(*args, **ddp))]


@pytest.mark.parametrize(
    ("forwards", "ddp", "severities"),
    [(20, {}, ["note"]), (10, {}, []), (12, {}, []), (20, {"broadcast_buffers": False}, ["note"])],
)
def test_several_forwards_before_a_backward_pass(forwards, ddp, severities):
    found = examine("BN028", describe(nn.BatchNorm2d(3), StepFacts(10, forwards, {}), **ddp))

    assert [evidence.severity for evidence in found] == severities
    if severities:
        assert ("modified by an inplace" in found[0].text) is (not ddp)
        assert f"broadcast_buffers={bool(ddp)}" in found[0].remedy.call


def test_micro_batches_each_have_a_backward_pass():
    facts = describe(nn.BatchNorm2d(3), StepFacts(10, 40, {}))
    training = dataclasses.replace(facts.training, accumulation=4)
    assert not examine("BN028", dataclasses.replace(facts, training=training))


def test_norms_that_share_mini_batches_need_no_broadcast():
    assert not find(nn.SyncBatchNorm(3), broadcast_buffers=False)
    assert find(nn.BatchNorm2d(3), broadcast_buffers=False) == ["note"]


class Branches(nn.Module):
    def __init__(self, is_fixed=False):
        super().__init__()
        self.norms, self.is_fixed = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), is_fixed

    def forward(self, images):
        return self.norms[0 if self.is_fixed else int(images.mean() > 0)](images)


def test_norms_that_some_forwards_leave_out():
    data = [torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)]

    assert find(Branches(), None, data) == ["warning"]
    assert find(Branches(), None, data, static_graph=True, find_unused_parameters=True) == ["warning"]
    assert not find(Branches(), None, data, find_unused_parameters=True)  # the remedy
    assert not find(Branches(is_fixed=True), None, data)
    assert not find(Branches().requires_grad_(False), None, data)


def test_a_model_that_is_not_wrapped_has_no_settings():
    assert not examine("BN028", collect_facts(nn.BatchNorm2d(3)))

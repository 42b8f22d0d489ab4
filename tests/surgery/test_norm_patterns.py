"""What convert_norm refuses before anything is made."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext import ConfigError, NormSpec, convert_norm, freeze_norms
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from tests.workers import run_workers


def make_model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("specs", ["SyncBN", NormSpec(), [NormSpec()], {1: NormSpec()}, {"1": None}, {"1": 3}])
def test_patterns_map_names_to_norms(specs):
    model = make_model()
    with pytest.raises(ConfigError, match=r"specs must map patterns to norms; got .* \(convert_norm\)"):
        convert_norm(model, specs)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_field_that_a_spec_has_not_is_named():
    with pytest.raises(ConfigError, match=r"changes must be fields of NormSpec; got poplation .* population"):
        convert_norm(nn.Sequential(LevelBatchNorm2d(4, ["p3"])), poplation="shared")


def convert_wrapped(rank):
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        convert_norm(DistributedDataParallel(make_model()), {"": NormSpec()})


def test_a_wrapped_model_is_refused():
    run_workers(convert_wrapped, 2)


def test_a_frozen_affine_keeps_no_gradient_for_the_optimizer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    freeze_norms(model)
    before = model[1].bias.clone(), model[0].bias.clone()
    optimizer.step()
    assert torch.equal(model[1].bias, before[0])
    assert not torch.equal(model[0].bias, before[1])


def test_parameters_that_come_apart_are_reported():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    report = convert_norm(model, {"": NormSpec()})
    told = {(change.path, change.text) for change in report.changes}
    assert told == {(path, "its weight was shared with another module, and is its own now") for path in ("0", "1")}

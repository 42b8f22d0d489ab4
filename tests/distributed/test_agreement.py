"""What differs between workers is named on all of them."""

import pytest
import torch
from torch import nn

from bnext.distributed.agreement import check_agreement, describe_parameters, describe_values
from bnext.errors import LaunchError
from tests.workers import run_workers


def test_one_worker_agrees_with_itself():
    check_agreement("the configs", {"a": 1}, "Mend it.")


def compare(rank):
    check_agreement("the configs", {"a": 1, "b": (1, 2)}, "Mend it.")

    words = []
    for values in ({"a": 1, "b": rank // 2}, {"a": 1} if rank else {"a": 1, "b": 2}):
        with pytest.raises(LaunchError) as caught:
            check_agreement("the configs", values, "Mend it.")
        words.append(str(caught.value))
    return words


def test_differences_are_named_on_all_workers():
    every = run_workers(compare, 3)
    assert every[0] == every[1] == every[2]
    other_value, absent = every[0]
    assert "b 0 on worker 0 (" in other_value
    assert "1 on worker 2 (" in other_value
    assert "b 2 on worker 0 (" in absent
    assert "absent on worker 1 (" in absent


def test_models_are_told_apart_by_shapes_types_and_what_is_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    described = describe_parameters(model)
    assert described.keys() == model.state_dict().keys()

    others = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(3, 4, 1))]
    others.append(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).requires_grad_(False))
    assert all(describe_parameters(other) != described for other in others)

    before = describe_values(model)
    assert describe_values(model) == before
    with torch.no_grad():
        model[1].running_var[0] = 2
    assert {name for name, value in describe_values(model).items() if before[name] != value} == {"1.running_var"}

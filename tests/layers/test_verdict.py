"""A check of running statistics holds for those very tensors, as they were."""

import copy
import pickle

import pytest
import torch

from bnext import BatchNorm2d, NormSpec
from bnext.errors import StatisticsError

C = 4


def negative():
    return torch.full((C,), -1.0)


def assign(norm):
    norm.load_state_dict({**norm.state_dict(), "running_var": negative()}, assign=True)


def replace(norm):
    norm.running_var = negative()


def set_data(norm):
    norm.running_var.data = negative()


def set_data_twice(norm):
    """The memory of the first tensor is free when the third one is made."""
    norm.running_var.data = torch.ones(C)
    norm.running_var.data = negative()


def set_storage(norm):
    norm.running_var.set_(negative())


def write(norm):
    norm.running_var.fill_(-1)


def write_in_inference_mode(norm):
    with torch.inference_mode():
        norm.running_var.fill_(-1)


def swap(norm):
    torch.utils.swap_tensors(norm.running_var, negative())


def overflow(norm):
    norm.running_var.data.fill_(70000.0)
    norm.half().float()


def swap_and_overflow(norm):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        overflow(norm)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


REPLACEMENTS = [assign, replace, set_data, set_data_twice, set_storage, swap, overflow, swap_and_overflow]


@pytest.mark.parametrize("change", [*REPLACEMENTS, write, write_in_inference_mode])
def test_other_statistics_are_looked_at(change):
    norm, x = BatchNorm2d(C).eval(), torch.randn(2, C, 2, 2)
    norm(x)
    change(norm)
    with pytest.raises(StatisticsError, match="running statistics"):
        norm(x)


@pytest.mark.parametrize("change", REPLACEMENTS)
@pytest.mark.parametrize("answer", [{"training": "renorm"}, {"training": "population"}])
def test_in_training_other_tensors_are_looked_at(change, answer):
    norm, x = BatchNorm2d(C, NormSpec(**answer)).train(), torch.randn(2, C, 2, 2)
    norm(x)
    change(norm)
    with pytest.raises(StatisticsError, match="running statistics"):
        norm(x)


def test_copies_and_calls_with_another_state_are_looked_at():
    norm, x = BatchNorm2d(C).eval(), torch.randn(2, C, 2, 2)
    norm(x)
    for twin in (copy.deepcopy(norm), copy.copy(norm), pickle.loads(pickle.dumps(norm))):
        twin._buffers = {**twin._buffers, "running_var": negative()}
        with pytest.raises(StatisticsError, match="running statistics"):
            twin(x)
    with pytest.raises(StatisticsError, match="running statistics"):
        torch.func.functional_call(norm, {"running_var": negative()}, (x,))
    norm(x)


def test_statistics_that_were_made_in_inference_mode_are_looked_at_each_time():
    with torch.inference_mode():
        norm, x = BatchNorm2d(C).eval(), torch.randn(2, C, 2, 2)
        norm(x)
        norm.running_var.fill_(-1)
        with pytest.raises(StatisticsError, match="running statistics"):
            norm(x)


def test_statistics_that_were_right_are_looked_at_once(monkeypatch):
    """Looking waits for the device."""
    norm, x = BatchNorm2d(C).eval(), torch.randn(2, C, 2, 2)
    norm(x)
    monkeypatch.setattr("bnext.layers.ownership.check_statistics", None)
    norm(x)

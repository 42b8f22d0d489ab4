"""Calls that cannot be made are found before any is."""

import functools

import pytest
import torch
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from bnext.errors import ConfigError
from bnext.lazy_config.calls import check_calls, find_arguments

RIGHT = {
    "a class": L(torch.nn.Linear)(in_features=1, out_features=2),
    "a name": {"_target_": "torch.nn.Linear", "in_features": 1},
    "a function in C": L(torch.relu)(input=None),
    "any arguments": L(functools.partial)(a=1),
    "not yet all arguments": L(torch.optim.SGD)(lr=0.1),
}
WRONG = {
    "a name that is near": (
        {"_target_": "torch.nn.Linaer"},
        r"model\.part\._target_.*Did you mean 'torch\.nn\.Linear'",
    ),
    "a module that is not there": ({"_target_": "absent.module.Linear"}, r"_target_.*absent"),
    "no function": ({"_target_": "torch.nn"}, r"_target_.*'torch\.nn'"),
    "an argument": (L(torch.nn.Linear)(in_feature=1), r"model\.part\.in_feature.*of Linear.*'in_features'"),
    "a value that is missing": ({"a": "???"}, r"model\.part\.a must have a value"),
    "a reference to nothing": ({"a": "${..absent}"}, r"model\.part\.a must have a value.*absent"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_call_that_can_be_made_is_let_pass(name):
    check_calls(OmegaConf.create({"model": [{"part": RIGHT[name]}]}, flags={"allow_objects": True}), ["model"], "file")


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_cannot_be_made_is_named(name):
    node, words = WRONG[name]
    config = OmegaConf.create({"model": {"part": node}}, flags={"allow_objects": True})
    check_calls(config, ["other"], "file")
    with pytest.raises(ConfigError, match=words):
        check_calls(config, ["model"], "file")


def test_arguments_of_detectron2s_configurable_classes_are_found():
    from detectron2.modeling import RetinaNet

    assert {"backbone", "head", "num_classes"} <= set(find_arguments(RetinaNet))

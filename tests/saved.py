"""Saved checkpoints of random weights, and the configs that load them."""

from pathlib import Path

import torch
from detectron2.modeling import build_model

from tests import tiny

ON = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2)
NODE = "TEST.BNEXT.PRECISE_BN"


def save(path, config=tiny.CONFIG, *opts):
    """Random weights of a config, saved as a training does."""
    torch.manual_seed(0)
    model = build_model(tiny.load(path.parent, *opts, config=config))
    torch.save({"model": model.state_dict(), "iteration": 5, "optimizer": {"lr": 1.0}, "classes": ["a"]}, path)
    return path


def load(weights, *opts, config=tiny.CONFIG):
    return tiny.load(Path(weights).parent / "unused", *ON, "MODEL.WEIGHTS", weights, *opts, config=config)


def buffers_that_differ(first, second):
    return {key for key in first if key not in second or not torch.equal(first[key], second[key])}

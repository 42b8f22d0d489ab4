"""A norm that is applied to one level after the other is told of; ordinary trainings are not."""

import logging

import pytest
import torch
from torch import nn

from bnext import notices
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec, build_norm


@pytest.fixture(autouse=True)
def nothing_was_told(monkeypatch):
    monkeypatch.setattr(notices, "_told_names", set())


def train(norm, steps, optimizer_steps=True):
    """One list of calls for each backward pass; sides of the features."""
    optimizer = torch.optim.SGD(norm.parameters(), 0.1)
    for sides in steps:
        sum(norm(torch.randn(2, 4, side, side)).pow(3).sum() for side in sides).backward()
        if optimizer_steps:
            optimizer.step()
            optimizer.zero_grad()


def test_levels_in_one_step_are_told_once(caplog):
    norms = [build_norm(NormSpec())(4) for _ in range(2)]
    with caplog.at_level(logging.WARNING, logger="bnext"):
        for norm in norms:
            train(norm, [(8, 4, 2)] * 2)
    assert len(caplog.records) == 1
    assert "BatchNorm2d" in caplog.text


@pytest.mark.parametrize(
    ("spec", "steps", "optimizer_steps"),
    [
        (NormSpec(), [(8,), (6,), (4,)], True),  # several scales
        (NormSpec(), [(8,), (6,), (4,)], False),  # gradients that are accumulated
        (NormSpec(), [(8, 8)], True),  # twins
        (NormSpec(frozen="statistics"), [(8, 4)], True),
        (NormSpec(population="none", inference="mini_batch"), [(8, 4)], True),
    ],
)
def test_ordinary_calls_are_not(spec, steps, optimizer_steps, caplog):
    norm = BatchNorm2d(4, spec)
    with caplog.at_level(logging.WARNING, logger="bnext"):
        with torch.no_grad():
            for side in (8, 6):
                norm(torch.randn(2, 4, side, side))
        train(norm, steps, optimizer_steps)
    assert not caplog.text


def test_a_watch_ends():
    norm = BatchNorm2d(4)
    train(norm, [(8,)] * 6)
    assert norm._last_call is None


def test_detectron2s_own_head_with_our_norm_is_told(caplog):
    retinanet = pytest.importorskip("detectron2.modeling.meta_arch.retinanet")
    layers = pytest.importorskip("detectron2.layers")
    shapes = [layers.ShapeSpec(channels=4)] * 2
    features = [torch.randn(2, 4, side, side) for side in (8, 4)]

    head = retinanet.RetinaNetHead(
        input_shape=shapes, num_classes=2, num_anchors=1, conv_dims=[4], norm=build_norm(NormSpec())
    )
    with caplog.at_level(logging.WARNING, logger="bnext"):
        head(features)
    assert "LevelBatchNorm2d" in caplog.text
    assert not any(isinstance(module, LevelBatchNorm2d) for module in head.modules())
    assert isinstance(head.cls_subnet[1], nn.BatchNorm2d)

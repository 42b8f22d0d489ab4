"""Micro-batches in a training: the images and the resume are those of the training without them."""

import logging.handlers
from pathlib import Path

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from torch import nn

from bnext.cli.train import check_run
from bnext.data.batches import build_validation_batches
from bnext.engine import Trainer, train
from bnext.engine.accumulation import AccumulatingTrainer
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import recompute_statistics
from bnext.layers import BatchNorm2d, NormSpec
from tests import tiny

SHORT = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
KEY = "SOLVER.BNEXT.ACCUMULATE"


def weights(folder):
    return torch.load(Path(folder, "model_final.pth"))["model"]


def describe(batch):
    return [(record["file_name"], record["image"].float().sum().item()) for record in batch]


@pytest.fixture(scope="module")
def accumulated(digits, tmp_path_factory):
    """The output of a whole training with two micro-batches, the images of every call, and what was said."""
    folder, calls, said = tmp_path_factory.mktemp("accumulated"), [], logging.handlers.BufferingHandler(10**6)
    trainer = Trainer(tiny.load(folder, *SHORT, KEY, 2))
    trainer.model.register_forward_pre_hook(lambda model, args: calls.append(describe(args[0])))

    logger = logging.getLogger("bnext.engine.accumulation")
    logger.addHandler(said)
    trainer.train()
    logger.removeHandler(said)
    return folder, calls, [record.getMessage() for record in said.buffer]


def test_the_images_of_a_step_are_those_without_micro_batches(accumulated, tmp_path):
    """With their augmentations, and in their order."""
    _, calls, _ = accumulated
    batches = iter(Trainer(tiny.load(tmp_path, *SHORT)).data_loader)
    assert [len(call) for call in calls] == [2] * 8
    assert [calls[step] + calls[step + 1] for step in range(0, 8, 2)] == [describe(next(batches)) for _ in range(4)]


def test_what_differs_from_a_large_batch_is_said_once(accumulated):
    (said,) = accumulated[2]
    assert "2 micro-batches of 2 images" in said
    assert "RetinaNet's moving average" in said


def test_a_resumed_training_is_the_uninterrupted_one(accumulated, tmp_path):
    cfg = tiny.load(tmp_path, *SHORT, KEY, 2)
    tiny.train_until(cfg, 3)
    train(cfg, resume=True)
    whole, resumed = weights(accumulated[0]), weights(tmp_path)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert tiny.read_metrics(accumulated[0])[-1] == tiny.read_metrics(tmp_path)[-1]


def test_statistics_and_validation_losses_are_of_micro_batches(digits, tmp_path):
    """Of as many images as without them."""
    cfg = tiny.load(tmp_path, *SHORT, KEY, 2, "TEST.PRECISE_BN.NUM_ITER", 3)
    model, sizes = build_model(cfg), []
    model.backbone.register_forward_pre_hook(lambda backbone, args: sizes.append(len(args[0])))
    recompute_statistics(cfg, model)
    assert sizes == [2] * 6
    assert [len(batch) for batch in build_validation_batches(cfg, "digits_val")] == [2, 2]


class MeanLoss(nn.Module):
    """A norm that is frozen, and losses that are means over a list of images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 2, 1), BatchNorm2d(2, NormSpec(frozen="statistics"))).double()

    def forward(self, images):
        outputs = self.layers(torch.stack(images))
        return {"square": outputs.square().mean(), "size": outputs.abs().mean()}


def test_weights_and_metrics_are_those_of_one_large_batch():
    generator = torch.Generator().manual_seed(1)
    batches = [list(torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=generator)) for _ in range(4)]
    states = []
    for number in (1, 3):
        model = MeanLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = SimpleTrainer(model, batches, optimizer)
        if number > 1:
            trainer = AccumulatingTrainer(model, batches, optimizer, number)
        trainer.train(0, 4)
        losses = [trainer.storage.history(name).values() for name in ("square", "size", "total_loss")]
        states.append([*model.parameters(), torch.tensor(losses, dtype=torch.float64)])
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [0, 3, 8, -1])
def test_a_number_that_does_not_divide_the_batch_is_refused(digits, tmp_path, number):
    cfg = tiny.load(tmp_path, *SHORT).clone()
    cfg.defrost()
    cfg.SOLVER.BNEXT.ACCUMULATE = number
    with pytest.raises(ConfigError, match=KEY):
        check_run(cfg)
    with pytest.raises(ConfigError, match=KEY):
        Trainer(cfg)


def test_without_the_key_steps_are_detectron2s(digits, tmp_path):
    assert type(Trainer(tiny.load(tmp_path))._trainer) is SimpleTrainer
    assert type(Trainer(tiny.load(tmp_path, KEY, 2))._trainer) is AccumulatingTrainer

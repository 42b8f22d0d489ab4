"""Virtual images in a training: they enlarge mini-batches, and nothing else of a step changes."""

from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import CallbackHook

from bnext import ConfigError
from bnext.engine import Trainer, train
from bnext.engine.virtual_images import VirtualImages
from bnext.scope import get_record
from tests import tiny
from tests.record import assert_nothing_is_open

SHORT = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
VIRTUAL = (*SHORT, "SOLVER.BNEXT.VIRTUAL_IMAGES", 2)


def weights(folder, name="model_final"):
    return torch.load(Path(folder, f"{name}.pth"))["model"]


@pytest.fixture(scope="module")
def enlarged(digits, tmp_path_factory):
    """The output of a whole training with virtual images."""
    folder = tmp_path_factory.mktemp("enlarged")
    train(tiny.load(folder, *VIRTUAL))
    return folder


def count_elements(trainer):
    """Elements per channel of the stem's mini-batch, its virtual ones, and the images of a step."""
    stem, seen = trainer._trainer.model.backbone.bottom_up.stem.conv1.norm, []

    def note(norm, args):
        record = get_record()
        if norm not in record.recorders:
            moments = record.virtual.get(norm)
            virtual = 0 if moments is None else int(moments[""].count)
            seen.append((args[0].numel() // args[0].shape[1], virtual, len(args[0])))

    stem.register_forward_pre_hook(note)
    return seen


def test_every_step_is_enlarged_and_nothing_is_left_after_it(digits, tmp_path):
    trainer = Trainer(tiny.load(tmp_path, *VIRTUAL))
    seen, left = count_elements(trainer), []
    trainer.register_hooks([CallbackHook(after_step=lambda _: left.append(get_record()))])
    trainer.train()
    assert [images for *_, images in seen] == [4] * 4
    assert all(virtual > 0 for _, virtual, _ in seen)
    assert left
    assert not any(record.virtual for record in left)


def test_normalizer_and_metrics_are_those_of_the_step_alone(enlarged, digits, tmp_path):
    train(tiny.load(tmp_path, *SHORT))
    plain, with_images = tiny.read_metrics(tmp_path), tiny.read_metrics(enlarged)
    assert [line.keys() for line in plain] == [line.keys() for line in with_images]
    assert plain[0]["num_pos_anchors"] == with_images[0]["num_pos_anchors"]
    assert plain[0]["total_loss"] != with_images[0]["total_loss"]


def test_a_resumed_training_is_the_uninterrupted_one(enlarged, tmp_path):
    cfg = tiny.load(tmp_path, *VIRTUAL)
    tiny.train_until(cfg, 3)
    train(cfg, resume=True)
    whole, resumed = weights(enlarged), weights(tmp_path)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_frozen_norms_need_no_virtual_images(digits, tmp_path):
    trainer = Trainer(tiny.load(tmp_path, *VIRTUAL, "SOLVER.BNEXT.FREEZE.ITER", 2))
    seen = count_elements(trainer)
    trainer.train()
    # In iteration 2 they are run for nothing: the norms are frozen right afterwards.
    assert [virtual > 0 for _, virtual, _ in seen] == [True, True, True, False]


def test_a_step_that_fails_leaves_nothing_behind(digits, tmp_path):
    trainer = Trainer(tiny.load(tmp_path, *VIRTUAL))

    def fail(_):
        raise KeyError("in a step")

    trainer.register_hooks([CallbackHook(before_step=fail)])
    with pytest.raises(KeyError):
        trainer.train()
    assert_nothing_is_open()


@pytest.mark.parametrize(
    "opts",
    [
        ("SOLVER.BNEXT.VIRTUAL_IMAGES", -1),
        (*VIRTUAL, *tiny.NO_LEVELS, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "GN"),
    ],
)
def test_a_number_without_effect_is_refused(digits, tmp_path, opts):
    with pytest.raises(ConfigError, match="VIRTUAL_IMAGES"):
        Trainer(tiny.load(tmp_path, *opts))


def test_without_the_key_there_is_no_hook(digits, tmp_path):
    assert not any(isinstance(hook, VirtualImages) for hook in Trainer(tiny.load(tmp_path))._hooks)

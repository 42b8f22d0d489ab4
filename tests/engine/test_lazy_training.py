"""Trainings from LazyConfigs: those of their YAML twins, resumed exactly, and in the manner of detectron2's ViTDet."""

import shutil

import pytest
import torch
from detectron2.modeling import build_model

from bnext.cli.train import check_run
from bnext.data.batches import build_validation_batches
from bnext.data.mapping import ImageMapper, build_mapper
from bnext.engine import Trainer, train
from bnext.engine.resume import read_training_keys
from bnext.errors import CheckpointError, ConfigError, StatisticsError
from bnext.evaluation.reestimate import recompute_statistics
from tests import tiny

VITDET = tiny.ROOT / "tests/engine/vitdet_lazy.py"
EXAMPLE = tiny.ROOT / "configs/Digits-Detection"
NO_TEST = ("DATASETS.TEST", "()")
SMALL = ("dataloader.train.mapper.augmentations.0.short_edge_length=48", "lr_multiplier.warmup_length=0.5")
SMALL_YAML = ("INPUT.MIN_SIZE_TRAIN", "(48,)", "SOLVER.WARMUP_ITERS", 1)


def load(output, *words, config=tiny.LAZY):
    return tiny.load(output, *words, config=config)


def read_weights(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth")["model"]


def differ(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_the_example_trains_like_its_yaml_twin_bit_by_bit(digits, tmp_path):
    """From the same weights: the same images, losses, schedule, and weights."""
    size = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "MODEL.WEIGHTS", tmp_path / "start.pth", *NO_TEST)
    lazy = load(tmp_path / "lazy", *SMALL, *size, config=EXAMPLE / "retinanet_R_18_FPN.py")
    twin = load(tmp_path / "yaml", *SMALL_YAML, *size, config=EXAMPLE / "retinanet_R_18_FPN.yaml")
    torch.save({"model": build_model(twin).state_dict()}, tmp_path / "start.pth")

    for cfg in (lazy, twin):
        train(cfg)
    assert differ(read_weights(tmp_path / "lazy"), read_weights(tmp_path / "yaml")) == []
    assert differ(read_weights(tmp_path / "lazy"), torch.load(tmp_path / "start.pth")["model"]) != []
    assert tiny.read_metrics(tmp_path / "lazy") == tiny.read_metrics(tmp_path / "yaml")


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("lazy")
    train(load(folder, *NO_TEST))
    return folder


def test_a_resumed_training_has_the_same_bits(whole, tmp_path, caplog):
    cfg = load(tmp_path, *NO_TEST)
    tiny.train_until(cfg, 3)
    train(cfg, resume=True)
    assert differ(read_weights(whole), read_weights(tmp_path)) == []
    assert tiny.read_metrics(tmp_path)[-1] == tiny.read_metrics(whole)[-1]
    assert "not exact" not in caplog.text


def test_a_resume_with_another_file_says_in_what_it_differs(whole, tmp_path, bnext_log):
    training = torch.load(whole / "model_final.pth")["trainer"]["bnext"]
    assert training["optimizer"] == "SGD"
    before = read_training_keys(load(tmp_path))
    words = ["model.head.prior_prob=0.5", "optimizer.lr=0.5", "lr_multiplier.warmup_factor=0.5", "train.max_iter=9"]
    now = read_training_keys(load(tmp_path, *words, "train.log_period=3", "dataloader.train.num_workers=1"))
    assert {key for key in before if before[key] != now[key]} == {
        "model.head.prior_prob",
        "optimizer.lr",
        "lr_multiplier.warmup_factor",
        "SOLVER.MAX_ITER",
    }
    shutil.copy(whole / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    Trainer(load(tmp_path, *NO_TEST, *words[:2])).resume_or_load()
    assert "not exact: model.head.prior_prob is 0.5, it was 0.01" in bnext_log.text
    assert "keeps optimizer.lr 0.001" in bnext_log.text
    other = Trainer(load(tmp_path, *NO_TEST, "optimizer._target_=torch.optim.RMSprop"))
    with pytest.raises(CheckpointError, match="optimizer is RMSprop, it was SGD"):
        other.resume_or_load()


def test_mappers_are_those_of_the_file(digits, tmp_path):
    cfg = load(tmp_path, "SOLVER.IMS_PER_BATCH", 1)
    assert isinstance(build_mapper(cfg, True)._mapper, ImageMapper)
    train_sizes = {tuple(map(str, build_mapper(cfg, True)._mapper.augmentations.augs))}
    labelled = build_mapper(cfg, True, as_test=True)._mapper
    assert labelled.is_train
    assert len(labelled.augmentations.augs) == 1 != len(next(iter(train_sizes))), "without the flip of the training"
    batch = next(iter(build_validation_batches(cfg, "digits_val")))
    assert "instances" in batch[0]


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["optimizer=null"], "optimizer in a LazyConfig must be there for a training"),
        (["optimizer.params=3"], "optimizer.params must be a call that takes the model"),
        (["lr_multiplier=null"], "lr_multiplier in a LazyConfig must be there for a training"),
    ],
)
def test_what_a_training_lacks_is_refused_before_it_starts(digits, tmp_path, words, culprit):
    with pytest.raises(ConfigError, match=culprit):
        check_run(load(tmp_path, *words))
    check_run(load(tmp_path, *words, "MODEL.WEIGHTS", tiny.LAZY), eval_only=True)


def test_a_multiplier_of_another_kind_is_refused(digits, tmp_path):
    cfg = load(tmp_path, *NO_TEST, "lr_multiplier._target_=torch.nn.Identity")
    with pytest.raises(ConfigError, match="lr_multiplier must be a ParamScheduler"):
        Trainer(cfg)


@pytest.mark.parametrize("norm", ["BN", "LN"])
def test_a_config_in_the_manner_of_vitdet_trains_and_its_batch_norms_are_re_estimated(digits, tmp_path, norm):
    """A pyramid on one feature, norms by strings, AdamW with a layer decay: its numbers are those of the file."""
    cfg = load(tmp_path, f"model.backbone.norm={norm}", *NO_TEST, config=VITDET)
    trainer = Trainer(cfg)
    trainer.train()

    groups = trainer.optimizer.param_groups
    assert {round(group["initial_lr"], 9) for group in groups} == {0.001, 0.0005, 0.00025}
    assert all(group["lr"] == pytest.approx(0.1 * group["initial_lr"]) for group in groups)
    if norm == "LN":
        with pytest.raises(StatisticsError, match="batch norm"):
            recompute_statistics(cfg, trainer.model, num_batches=1)
    else:
        report = recompute_statistics(cfg, trainer.model, num_batches=1)
        assert {each.path for each in report.estimates} == {f"backbone.simfp_p{level}.norm" for level in (3, 4, 5)}

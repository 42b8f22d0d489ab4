"""Training and its exact resume, on real images."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bnext import kernels
from bnext.cli.main import build_parser
from bnext.cli.train import KERNELS, run, run_worker
from bnext.data.catalog import register_datasets
from bnext.engine import Trainer, evaluate, train
from bnext.errors import CheckpointError, ConfigError, DatasetError, StatisticsError
from tests import tiny


def weights(folder, name="model_final"):
    return torch.load(Path(folder, f"{name}.pth"))["model"]


def put_last(folder, state):
    """Let a resume in a folder go on from a checkpoint."""
    torch.save(state, folder / "model_0000002.pth")
    (folder / "last_checkpoint").write_text("model_0000002.pth")


def load_middle(finished):
    """The checkpoint in the middle of the finished training."""
    return torch.load(Path(finished[0].OUTPUT_DIR, "model_0000002.pth"))


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_resumed_training_is_the_uninterrupted_one(finished, tmp_path):
    whole = finished[0].OUTPUT_DIR
    opts = ("DATALOADER.NUM_WORKERS", 1, "SOLVER.BNEXT.DOCTOR.PERIOD", 0)
    cfg = tiny.load(tmp_path, *opts)  # neither loading processes nor the doctor have any influence
    tiny.train_until(cfg, 4)
    assert Path(tmp_path, "last_checkpoint").read_text() == "model_0000002.pth"
    torch.manual_seed(99)  # where the global generators stand has no influence
    train(cfg, resume=True)
    assert_same(weights(tmp_path), weights(whole))
    last, resumed = tiny.read_metrics(whole), tiny.read_metrics(tmp_path)
    assert [line for line in resumed if line["iteration"] == 5] == [line for line in last if line["iteration"] == 5]


def test_without_the_normalizer_a_resume_would_differ(finished, tmp_path):
    """detectron2 keeps the moving average of foreground anchors outside of the checkpoint."""
    state = load_middle(finished)
    assert state["trainer"]["bnext"]["workers"][0][""] != 100
    state["trainer"]["bnext"]["workers"] = [{}]
    put_last(tmp_path, state)
    train(tiny.load(tmp_path, "DATASETS.TEST", "()"), resume=True)
    resumed, whole = weights(tmp_path), weights(finished[0].OUTPUT_DIR)
    assert any(not torch.equal(resumed[key], whole[key]) for key in whole)


def test_the_output_directory_is_as_users_know_it(finished):
    folder = Path(finished[0].OUTPUT_DIR)
    assert {path.name for path in folder.glob("*.pth")} == {
        "model_0000002.pth",
        "model_0000005.pth",
        "model_final.pth",
    }
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert list(folder.glob("events.*"))
    results = json.loads((folder / "inference" / "results.json").read_text())
    assert results["digits_val"]["bbox"].keys() >= {"AP", "AP50", "AP75"}
    last = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()][-1]
    assert "bbox/AP" in last
    assert "AP" in finished[1]["bbox"]
    assert "BN001" in [finding["code"] for finding in json.loads((folder / "doctor.json").read_text())["findings"]]


def test_evaluating_the_final_checkpoint_gives_the_results_of_the_training(finished, tmp_path):
    cfg, results = finished
    path = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    assert evaluate(tiny.load(tmp_path, "MODEL.WEIGHTS", path))["bbox"] == pytest.approx(results["bbox"], nan_ok=True)

    every_box = evaluate(tiny.load(tmp_path, "MODEL.WEIGHTS", path, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0))
    assert 0 <= every_box["bbox"]["AP"] <= 100


def test_evaluating_without_weights_is_an_error(digits, tmp_path):
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS"):
        evaluate(tiny.load(tmp_path))


def test_a_drawn_seed_is_kept_by_the_checkpoint(digits, tmp_path):
    opts = ("SEED", -1, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3)
    train(tiny.load(tmp_path, *opts))
    stored = torch.load(tmp_path / "model_final.pth")["trainer"]["bnext"]["seed"]
    trainer = Trainer(tiny.load(tmp_path, *opts))
    assert trainer.seed != stored
    trainer.resume_or_load(resume=True)
    assert trainer.seed == trainer.data_loader.sampler.seed == stored
    assert trainer.data_loader.sampler.start_iteration == 3


def test_a_finished_training_has_nothing_left_to_do(finished, tmp_path, bnext_log):
    folder = Path(finished[0].OUTPUT_DIR)
    for name in ("model_final.pth", "last_checkpoint"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = (tmp_path / "model_final.pth").read_bytes()
    results = train(tiny.load(tmp_path), resume=True)
    assert results["bbox"].keys() == finished[1]["bbox"].keys()
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert "Nothing is left to train" in bnext_log.text


def resume_log(finished, folder, log, *opts):
    """What a resume of the finished training says, with a changed config."""
    put_last(folder, load_middle(finished))
    Trainer(tiny.load(folder, *opts)).resume_or_load(resume=True)
    # A set: the record arrives twice where bnext's logger is not set up yet.
    return list({record.getMessage() for record in log.records if "resume" in record.getMessage()})


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.IMS_PER_BATCH", 2), "not exact: SOLVER.IMS_PER_BATCH is 2, it was 4"),
        (("SOLVER.STEPS", "(3,)"), "not exact: SOLVER.STEPS is [3], it was [5]."),
        (("DATASETS.TRAIN", "('digits_val',)"), "not exact: DATASETS.TRAIN"),
        (("INPUT.RANDOM_FLIP", "none"), "not exact: INPUT.RANDOM_FLIP"),
        (("SOLVER.BASE_LR", 0.1), "The resume keeps SOLVER.BASE_LR 0.001, which is in the optimizer"),
    ],
)
def test_a_changed_solver_or_data_set_is_told(finished, tmp_path, bnext_log, opts, message):
    messages = resume_log(finished, tmp_path, bnext_log, *opts)
    assert len(messages) == 1
    assert message in messages[0]


def test_keys_of_the_optimizer_stay_those_of_the_checkpoint(finished, tmp_path, bnext_log):
    """What the message says is so."""
    resume_log(finished, tmp_path, bnext_log)
    cfg = tiny.load(tmp_path, "SOLVER.BASE_LR", 0.1, "SOLVER.MOMENTUM", 0.5, "DATASETS.TEST", "()")
    train(cfg, resume=True)
    assert_same(weights(tmp_path), weights(finished[0].OUTPUT_DIR))


def test_changes_without_influence_are_not_told(finished, tmp_path, bnext_log):
    opts = ("SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TEST", 32)
    assert resume_log(finished, tmp_path, bnext_log, *opts, "DATALOADER.NUM_WORKERS", 1) == []


def test_an_older_checkpoint_without_the_keys_resumes(finished, tmp_path, bnext_log):
    state = load_middle(finished)
    del state["trainer"]["bnext"]["config"]
    put_last(tmp_path, state)
    trainer = Trainer(tiny.load(tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 3
    assert "does not say with which solver and data" in bnext_log.text


def test_initial_weights_and_batches_are_a_function_of_the_seed(digits, tmp_path):
    def first(*opts):
        trainer = Trainer(tiny.load(tmp_path, *opts))
        return trainer.model.state_dict(), next(iter(trainer.data_loader))[0]["image"]

    torch.manual_seed(1)
    state, image = first()
    torch.manual_seed(2)
    again, same_image = first()
    other, _ = first("SEED", 8)
    assert_same(state, again)
    assert torch.equal(image, same_image)
    assert any(not torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize(
    "opts", [("SOLVER.OPTIMIZER", "ADAMW"), ("MODEL.BNEXT.RETINANET.AFFINE", "shared"), ("MODEL.BACKBONE.FREEZE_AT", 2)]
)
def test_a_resume_with_another_optimizer_or_other_parameters_is_refused(finished, tmp_path, opts):
    put_last(tmp_path, load_middle(finished))
    with pytest.raises(CheckpointError, match="optimizer of the resumed training"):
        Trainer(tiny.load(tmp_path, *opts)).resume_or_load(resume=True)


@pytest.mark.parametrize(
    "opts", [("MODEL.BACKBONE.NAME", "foo"), ("MODEL.RESNETS.DEPTH", 19), ("SOLVER.LR_SCHEDULER_NAME", "Foo")]
)
def test_a_config_that_cannot_be_built_is_a_mistake_of_the_config(digits, tmp_path, opts):
    with pytest.raises(ConfigError, match=f"{opts[0]} must|The config must"):
        train(tiny.load(tmp_path, *opts))


def test_an_image_that_cannot_be_read_is_named(digits, tmp_path, monkeypatch):
    shutil.copytree(digits, tmp_path / "sets")
    for path in (tmp_path / "sets/digits/train").iterdir():
        path.write_text("no picture")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    try:
        register_datasets()
        with pytest.raises(DatasetError, match="digits/train"):
            train(tiny.load(tmp_path / "out"))
    finally:
        tiny.register(digits)


def test_a_new_training_that_ends_early_is_not_resumed_as_the_old_one(digits, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_of_an_old_training.pth")
    with pytest.raises(CheckpointError):
        run_worker(tiny.load(tmp_path, "MODEL.WEIGHTS", "/nonexistent.pth"), build_parser("train").parse_args([]))
    assert not (tmp_path / "last_checkpoint").exists()


def test_kernels_are_checked_before_anything_is_written_and_put_back_after_the_run(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled
    args = build_parser("train").parse_args([])
    with pytest.raises(CheckpointError):
        run_worker(tiny.load(tmp_path / "a", KERNELS, "compiled", "MODEL.WEIGHTS", "/nonexistent.pth"), args)
    assert (tmp_path / "a").exists()
    assert kernels._kind == "torch"

    monkeypatch.setitem(sys.modules, "triton", None)
    for start in (run, run_worker):
        with pytest.raises(ConfigError, match=KERNELS):
            start(tiny.load(tmp_path / "b", KERNELS, "triton"), args)
    assert not (tmp_path / "b").exists()


def test_a_group_of_a_single_value_is_a_mistake_of_the_config(digits, tmp_path):
    channels = ("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.NORM", "GN", "SOLVER.IMS_PER_BATCH", 1)
    with pytest.raises(StatisticsError, match="INPUT.MIN_SIZE_TRAIN"):
        train(tiny.load(tmp_path, *channels, *tiny.NO_LEVELS, "INPUT.MIN_SIZE_TRAIN", "(48,)"))

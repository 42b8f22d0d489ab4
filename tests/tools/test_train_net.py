"""The command line: what it refuses before training starts, in one line; what a whole run leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import train_net
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.config import load_config
from bnext.errors import LaunchError
from tests import tiny
from tests.detector_fixtures import digits  # noqa: F401  the fixture


@pytest.fixture
def refuse(digits, tmp_path, capsys):  # noqa: F811
    """Run the command; return its one line of error. Nothing may have been trained."""

    def run(*arguments, output=tmp_path / "out"):
        command = arguments if "--config-file" in arguments else ("--config-file", tiny.CONFIG, *arguments)
        assert train_net.main([*map(str, command), "OUTPUT_DIR", str(output)]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: "), line
        assert "\n" not in line
        assert not list(tmp_path.glob("**/*.pth"))
        return line

    return run


def test_unknown_keys_and_values_are_refused(refuse, tmp_path):
    assert "MODEL.NOPE" in refuse("MODEL.NOPE", 1)
    assert "MODEL.BNEXT.RETINANET.AFFINE" in refuse("MODEL.BNEXT.RETINANET.AFFINE", "everyone")
    assert "pairs" in refuse("MODEL.WEIGHTS")
    assert "SOLVER.MAX_ITER" in refuse("SOLVER.MAX_ITER", "many")
    path = tmp_path / "wrong.yaml"
    path.write_text("MODEL: {NOPE: 1}")
    assert "MODEL.NOPE" in refuse("--config-file", path)
    path.write_text("MODEL: {")
    assert "wrong.yaml" in refuse("--config-file", path)
    assert "absent.yaml" in refuse("--config-file", tmp_path / "absent.yaml")
    assert "SOLVER.OPTIMIZER" in refuse("SOLVER.OPTIMIZER", "LION")


def test_unknown_architectures_and_devices_are_refused(refuse):
    line = refuse("MODEL.META_ARCHITECTURE", "BNextRetinanet")
    assert "MODEL.META_ARCHITECTURE" in line
    assert "BNextRetinaNet" in line, "the one that was meant is among the choices"
    assert "MODEL.DEVICE" in refuse("MODEL.DEVICE", "gpu")
    assert "MODEL.DEVICE" in refuse("MODEL.DEVICE", "None")


def test_sets_without_coco_metrics_are_refused_before_training(refuse):
    DatasetCatalog.register("bnext_test_voc", list)
    MetadataCatalog.get("bnext_test_voc").evaluator_type = "pascal_voc"
    try:
        # Before the training set is read.
        line = refuse("DATASETS.TRAIN", "('absent',)", "DATASETS.TEST", "('bnext_test_voc',)")
    finally:
        DatasetCatalog.remove("bnext_test_voc")
        MetadataCatalog.remove("bnext_test_voc")
    assert "'bnext_test_voc' (evaluator_type 'pascal_voc')" in line


def test_data_sets_are_checked_first(refuse):
    assert "'digits_tain'" in refuse("DATASETS.TRAIN", "('digits_tain',)")
    assert "DATASETS.TRAIN" in refuse("DATASETS.TRAIN", "()")
    assert "DATASETS.TEST" in refuse("--eval-only", "DATASETS.TEST", "()")
    assert "digits_train" in refuse("MODEL.RETINANET.NUM_CLASSES", 3)


def test_what_the_machine_lacks_is_named(refuse, tmp_path):
    line = refuse("--num-gpus", 4095, "DATASETS.TRAIN", "('absent',)")  # before batch size and data sets
    assert "--num-gpus must be at most" in line
    assert "4095" in line
    assert "--num-machines" in refuse("--num-machines", 0)
    several = ("--num-machines", 3, "--dist-url", "tcp://127.0.0.1:1", "DATASETS.TRAIN", "('absent',)")
    for batch_size in (several, ("SOLVER.REFERENCE_WORLD_SIZE", 3), ("SOLVER.IMS_PER_BATCH", 0)):
        assert "SOLVER.IMS_PER_BATCH" in refuse(*batch_size)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert f"'{blocked}/out'" in refuse(output=blocked / "out")


def test_weights_are_checked(refuse, tmp_path):
    assert "'/absent.pth'" in refuse("MODEL.WEIGHTS", "/absent.pth")
    assert "MODEL.WEIGHTS" in refuse("--eval-only")


def test_a_key_of_bnext_is_known_without_a_further_call():
    """facebookresearch/detectron2#3187: "Non-existent config key" where add_xxx_config was forgotten."""
    with pytest.raises((KeyError, AssertionError), match="BNEXT"):
        get_cfg().merge_from_list(["MODEL.BNEXT.RETINANET.AFFINE", "shared"])
    assert load_config("", ["MODEL.BNEXT.RETINANET.AFFINE", "shared"]).MODEL.BNEXT.RETINANET.AFFINE == "shared"


def test_a_machine_without_cuda_takes_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load_config("").MODEL.DEVICE == "cpu"
    assert load_config("", ["MODEL.DEVICE", "meta"]).MODEL.DEVICE == "meta"
    with pytest.raises(LaunchError, match="cuda:1"):
        load_config("", ["MODEL.DEVICE", "cuda:1"])


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def check_output(result, folder):
    """What a person reads is on the screen, and all of it in log.txt; files are what their names say."""
    lines = result.stdout.splitlines()
    before = next(number for number, line in enumerate(lines) if "Starting training from iteration 0" in line)
    assert before <= 30, "\n".join(lines)
    assert len(lines) <= before + 25, "\n".join(lines)
    assert not result.stderr
    assert sum("Evaluation on digits_val" in line for line in lines) == 1
    assert "| SOLVER.MAX_ITER " in result.stdout
    assert "Training on digits_train: 12 images" in result.stdout

    log = Path(folder, "log.txt").read_text()
    for text in ("Environment info", "IMS_PER_BATCH", "LevelBatchNorm2d(", "Average Precision", "copypaste: AP"):
        assert text in log
        assert text not in result.stdout
    for line in lines:
        assert line.partition("]: ")[2].removeprefix("WARNING ") in log or not line.startswith("[")
    for text in (result.stdout, result.stderr, log, Path(folder, "config.yaml").read_text()):
        assert "\x1b" not in text

    metrics = Path(folder, "metrics.json").read_text().splitlines()
    values = [json.loads(line, parse_constant=refuse_constant) for line in metrics]
    assert "total_loss" in values[0]
    assert values[-1]["bbox/APl"] is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # detectron2 leaves a file open
def test_a_run_leaves_what_users_expect_and_its_checkpoint_evaluates(digits, tmp_path, monkeypatch, capsys):  # noqa: F811
    arguments = ["--config-file", str(tiny.CONFIG), "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "3"]
    arguments += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]  # so that there is something to evaluate
    result = subprocess.run(
        [sys.executable, "tools/train_net.py", *arguments],
        cwd=tiny.ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"},
        timeout=110,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "iter: 2  total_loss" in result.stdout  # plain lines, as this is no terminal
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.yaml", "log.txt", "metrics.json", "last_checkpoint", "model_final.pth", "inference"}
    assert list(tmp_path.glob("events.*"))
    check_output(result, tmp_path)

    before = Path(tmp_path, "inference", "results.json").read_text()
    shutil.rmtree(tmp_path / "inference")
    monkeypatch.setenv("BNEXT_VERBOSE", "0")  # as it is put back afterwards
    assert train_net.main(["--eval-only", "--resume", "--verbose", *arguments]) == 0
    assert "Environment info" in capsys.readouterr().out
    assert Path(tmp_path, "inference", "results.json").read_text() == before
    assert Path(tmp_path, "last_checkpoint").exists(), "only a new training forgets it"


def test_options_among_the_pairs_are_named(refuse):
    assert "Options must come before" in refuse("SOLVER.MAX_ITER", 2, "--eval-only", 1)


@pytest.mark.parametrize(
    ("option", "meant"), [("--eval_only", "--eval-only"), ("--resume-from", "--resume"), ("--num-gpu=2", None)]
)
def test_an_unknown_option_is_told_with_the_one_that_was_meant(option, meant, capsys, tmp_path):
    """An abbreviation is none."""
    if meant is None:
        assert train_net.main([option, "--config-file", str(tmp_path / "absent.yaml")]) == 2
        assert "absent.yaml" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as exit:
        train_net.main([option, "x"])
    line = capsys.readouterr().err
    assert (exit.value.code, line.count("\n")) == (2, 1)
    assert option in line
    assert f"Did you mean {meant}?" in line

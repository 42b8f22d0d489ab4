"""What a resume needs: a folder that can be written into, and the state of a training."""

import contextlib
import copy
import json
import os
import shutil

import pytest
import torch

from bnext.cli.train import check_run
from bnext.engine import Trainer, train
from bnext.engine.resume import check_output_files, check_training_state, drop_half_line, expect_same_optimizer
from bnext.errors import CheckpointError, LaunchError
from tests import tiny

GOOD = {
    "iteration": 3,
    "hooks": {"LRScheduler": {"last_epoch": 3}},
    "_trainer": {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}},
    "bnext": {"seed": 1, "total_batch_size": 2, "workers": [{"head": 100.0}]},
}


def obstruct(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
@pytest.mark.parametrize(
    "name", ["metrics.json", "log.txt", "config.yaml", "model_final.pth", "last_checkpoint", "best.json"]
)
def test_what_stands_in_the_place_of_a_file_is_named(tmp_path, name, kind):
    check_output_files(str(tmp_path))
    obstruct(tmp_path / name, kind)
    with pytest.raises(LaunchError, match=f"{name} in OUTPUT_DIR.*{kind}"):
        check_output_files(str(tmp_path))
    with pytest.raises(LaunchError, match=name) if name in ("log.txt", "config.yaml") else contextlib.nullcontext():
        check_output_files(str(tmp_path), training=False)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "inference").write_text("")
    with pytest.raises(LaunchError, match="inference in OUTPUT_DIR must be a folder.*got a file"):
        check_output_files(str(tmp_path), training=False)


@pytest.mark.parametrize("content", ["", '{"a": 1}\n', '{"a": 1}\n{"a": 2', '{"a": 1', '{"a": 1}\n{"a": 2}'])
def test_half_a_line_of_metrics_is_left_out(tmp_path, content):
    path = tmp_path / "metrics.json"
    drop_half_line(str(path))
    path.write_text(content)
    drop_half_line(str(path))
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    values = [json.loads(line)["a"] for line in path.read_text().splitlines()]
    assert values == [*range(1, 1 + content.count("}")), 3]


WRONG = {
    "'trainer'": [1],
    "'iteration'": {**GOOD, "iteration": -1},
    "iteration": {key: value for key, value in GOOD.items() if key != "iteration"},
    "'bnext'": {**GOOD, "bnext": {"seed": 1}},
    "workers": {**GOOD, "bnext": {**GOOD["bnext"], "workers": []}},
    "NaN": {**GOOD, "_trainer": {"optimizer": {"state": [torch.tensor([torch.nan])], "param_groups": []}}},
    "lr": {**GOOD, "_trainer": {"optimizer": {"state": {}, "param_groups": [{"lr": float("nan")}]}}},
    "'optimizer'": {**GOOD, "_trainer": {"optimizer": {}}},
    "optimizer": {key: value for key, value in GOOD.items() if key != "_trainer"},
    "'LRScheduler'": {**GOOD, "hooks": {}},
    "LRScheduler": {**GOOD, "hooks": None},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_no_training_wrote_is_refused(name):
    check_training_state(GOOD, "here", ["LRScheduler"])
    check_training_state({"iteration": 3}, "of detectron2")
    with pytest.raises(CheckpointError, match=rf"{name}.*\(here\)"):
        check_training_state(WRONG[name], "here", ["LRScheduler"])


def test_momenta_of_other_shapes_are_refused_when_they_are_loaded(tmp_path):
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()

    state = copy.deepcopy(optimizer.state_dict())
    with expect_same_optimizer(tiny.load(tmp_path), optimizer, GOOD):
        optimizer.load_state_dict(state)
    state["state"][0]["momentum_buffer"] = torch.zeros(3)
    shapes = pytest.raises(CheckpointError, match=r"momentum_buffer of shape \(3,\)")
    with shapes, expect_same_optimizer(tiny.load(tmp_path), optimizer, GOOD):
        optimizer.load_state_dict(state)


def test_a_training_does_not_resume_from_weights_alone(finished, tmp_path):
    state = torch.load(f"{finished[0].OUTPUT_DIR}/model_final.pth")
    torch.save({"model": state["model"]}, tmp_path / "model_0000002.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    trainer = Trainer(tiny.load(tmp_path))
    with pytest.raises(CheckpointError, match="state of its training"):
        trainer.resume_or_load(resume=True)
    assert trainer.start_iter == trainer.iter == 0


def test_a_damaged_folder_is_refused_before_workers_start(digits, tmp_path):
    cfg = tiny.load(tmp_path)
    (tmp_path / "last_checkpoint").write_text("absent.pth")
    with pytest.raises(CheckpointError, match=r"last_checkpoint.*absent\.pth"):
        check_run(cfg, resume=True)
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(LaunchError, match=r"metrics\.json"):
        check_run(cfg)
    with pytest.raises(LaunchError, match=r"metrics\.json"):
        train(cfg)


def test_a_training_that_ended_between_its_last_two_files_gets_the_last(finished, tmp_path):
    for name in ("model_0000005.pth", "metrics.json"):
        shutil.copy(f"{finished[0].OUTPUT_DIR}/{name}", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    train(tiny.load(tmp_path), resume=True)
    assert (tmp_path / "model_final.pth").read_bytes() == (tmp_path / "model_0000005.pth").read_bytes()

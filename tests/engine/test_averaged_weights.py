"""What a training has around it: an average of its weights, metrics of its norms, the best weights. None moves it."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import CallbackHook

from bnext.engine import Trainer, evaluate, train
from bnext.errors import CheckpointError, StatisticsError
from tests import tiny

EMA = ("SOLVER.BNEXT.EMA.ENABLED", True, "SOLVER.BNEXT.EMA.DECAY", 0.6)
AROUND = (*EMA, "SOLVER.BNEXT.NORM_METRICS.PERIOD", 2, "TEST.EVAL_PERIOD", 3, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 3)
AROUND += ("TEST.BNEXT.BEST.METRIC", "validation_loss/total_loss")  # the least is best
STEM = "backbone.bottom_up.stem.conv1"


def load(folder, name="model_final"):
    return torch.load(Path(folder, f"{name}.pth"))


def differ(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def merge_metrics(folder):
    """Metric -> its last value."""
    return {name: value for line in tiny.read_metrics(folder) for name, value in line.items()}


@pytest.fixture(scope="module")
def surrounded(digits, tmp_path_factory):
    """The output of a whole training with all of it, and the weights before it and after every step."""
    folder = tmp_path_factory.mktemp("surrounded")
    trainer = Trainer(tiny.load(folder, *AROUND))
    states = [{name: value.clone() for name, value in trainer.model.state_dict().items()}]

    class Watch(CallbackHook):
        def after_step(self):
            states.append({name: value.clone() for name, value in self.trainer.model.state_dict().items()})

    trainer.register_hooks([Watch()])
    trainer.train()
    return folder, states


def test_the_training_is_bitwise_the_one_without(finished, surrounded):
    assert differ(load(finished[0].OUTPUT_DIR)["model"], load(surrounded[0])["model"]) == []


def test_the_file_is_the_average_of_all_steps_and_loads_anywhere(surrounded, tmp_path):
    folder, states = surrounded
    saved = load(folder, "model_ema")
    assert saved.keys() == {"model", "iteration", "norm_specs"}
    average = dict(states[0])
    for step, state in enumerate(states[1:]):
        weight = min(0.6, (1 + step) / (10 + step))
        average = {name: weight * value + (1 - weight) * state[name] for name, value in average.items()}

    for name, value in saved["model"].items():
        expected = states[-1][name] if "num_batches" in name else average[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert f"{STEM}.weight" in differ(saved["model"], states[-1])
    evaluate(tiny.load(tmp_path, "MODEL.WEIGHTS", folder / "model_ema.pth"))


def test_the_average_is_evaluated_beside_the_weights(surrounded):
    folder, _ = surrounded
    metrics = merge_metrics(folder)
    assert {"bbox/AP", "ema/bbox/AP", "validation_loss/total_loss"} <= metrics.keys()
    assert (folder / "ema/inference/results.json").exists()


def test_norms_are_measured(surrounded):
    metrics = merge_metrics(surrounded[0])
    assert metrics[f"norms/{STEM}.norm/normalization_batch_size"] == 4
    names = {name.rpartition("/")[2] for name in metrics if name.startswith("norms/head.cls_subnet.1/")}
    assert names == {"mean_distance", "var_ratio", "normalization_batch_size", "between_groups"}


def test_the_best_weights_are_kept(surrounded):
    folder, states = surrounded
    memory = json.loads((folder / "best.json").read_text())
    assert [one["iteration"] for one in memory["evaluations"]] == [2, 5]
    assert memory["best"] == min(memory["evaluations"], key=lambda one: one["value"])
    best = load(folder, "model_best")
    assert best["best"] == {"metric": "validation_loss/total_loss", **memory["best"]}
    assert differ(best["model"], states[memory["best"]["iteration"] + 1]) == []


def test_a_resumed_training_is_the_uninterrupted_one(surrounded, tmp_path):
    cfg = tiny.load(tmp_path, *AROUND)
    tiny.train_until(cfg, 4)
    train(cfg, resume=True)
    whole, _ = surrounded
    for name in ("model_final", "model_ema", "model_best"):
        assert differ(load(whole, name)["model"], load(tmp_path, name)["model"]) == []
    hooks = [load(folder)["trainer"]["hooks"]["AverageWeights"] for folder in (whole, tmp_path)]
    assert [state["num_updates"] for state in hooks] == [6, 6]
    assert differ(*(state["averages"] for state in hooks)) == []
    assert (whole / "best.json").read_text() == (tmp_path / "best.json").read_text()
    first, second = ([line for line in tiny.read_metrics(path) if line["iteration"] == 5] for path in (whole, tmp_path))
    assert first == second != []


def test_re_estimated_statistics_are_those_of_the_averaged_weights(digits, tmp_path):
    opts = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "DATASETS.TEST", "()", "TEST.PRECISE_BN.NUM_ITER", 2)
    train(tiny.load(tmp_path, *EMA, *opts, "SOLVER.BNEXT.EMA.BUFFERS", "re_estimated"))
    weights, average = load(tmp_path)["model"], load(tmp_path, "model_ema")["model"]
    assert average[f"{STEM}.norm.num_batches_tracked"] == 2
    assert not torch.equal(average[f"{STEM}.norm.running_mean"], weights[f"{STEM}.norm.running_mean"])
    assert torch.isfinite(average[f"{STEM}.norm.running_var"]).all()


def test_another_checkpoint_begins_an_average_or_is_refused(finished, surrounded, tmp_path, bnext_log):
    for name, source in (("plain", finished[0].OUTPUT_DIR), ("other", surrounded[0])):
        (tmp_path / name).mkdir()
        torch.save(load(source, "model_0000002"), tmp_path / name / "model_0000002.pth")
        (tmp_path / name / "last_checkpoint").write_text("model_0000002.pth")

    train(tiny.load(tmp_path / "plain", *EMA, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 4), resume=True)
    assert "begins with the weights of iteration 3" in bnext_log.text
    other = tiny.load(tmp_path / "other", *EMA, "SOLVER.BNEXT.EMA.BUFFERS", "copied", "DATASETS.TEST", "()")
    with pytest.raises(CheckpointError, match=r"SOLVER\.BNEXT\.EMA"):
        train(other, resume=True)


def test_a_model_without_statistics_has_none_to_estimate(digits, tmp_path):
    norms = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "GN", *tiny.NO_LEVELS)
    with pytest.raises(StatisticsError, match="batch norm"):
        Trainer(tiny.load(tmp_path, *EMA, "SOLVER.BNEXT.EMA.BUFFERS", "re_estimated", *norms))

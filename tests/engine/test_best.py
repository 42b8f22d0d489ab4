"""The best weights by a metric, and an end where it gets no better: remembered, refused where it cannot be."""

import json
import math

import pytest
import torch
from detectron2.engine import HookBase

from bnext.cli.train import check_run
from bnext.engine import Trainer
from bnext.engine.best import BestCheckpoint, Evaluation, check_best_metric, find_end, limit_iterations
from bnext.engine.hooks import EvalHook
from bnext.engine.loop import run_iterations
from bnext.errors import ConfigError
from tests import tiny
from tests.engine.quadratic import make_trainer

METRIC = ("TEST.BNEXT.BEST.METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 2)


def run(folder, values, *opts, start=0, max_iter=20, metrics=None):
    """Train one weight; evaluation number i of iteration 2 i + 1 has value i of `values`, later ones the last."""
    cfg = tiny.load(folder, *METRIC, "SOLVER.MAX_ITER", max_iter, "SOLVER.STEPS", "()", *opts)
    trainer = make_trainer()
    trainer.start_iter, trainer.max_iter = start, limit_iterations(cfg, start, max_iter)
    evaluated, steps = [], []

    def evaluate():
        done = min(trainer.iter, trainer.max_iter - 1)
        evaluated.append(done)
        value = values[min(done // 2, len(values) - 1)]
        return metrics or {"bbox": {"AP": value, "AP50": 1.0}}

    class Watch(HookBase):
        def after_step(self):
            steps.append(trainer.iter)

    trainer.register_hooks([EvalHook(2, evaluate), BestCheckpoint(cfg), Watch()])
    run_iterations(trainer)
    return evaluated, steps


def best_of(folder):
    return torch.load(folder / "model_best.pth")["best"]["iteration"]


def test_the_first_of_the_best_is_kept(tmp_path):
    evaluated, steps = run(tmp_path, [1.0, math.nan, 3.0, 2.0, 3.0, math.inf, 0.0])
    assert (len(steps), evaluated) == (20, [*range(1, 20, 2)])
    assert best_of(tmp_path) == 5
    memory = json.loads((tmp_path / "best.json").read_text())
    assert memory["best"] == {"iteration": 5, "value": 3.0}
    assert [one["value"] for one in memory["evaluations"]] == [1.0, None, 3.0, 2.0, 3.0, None, 0.0, 0.0, 0.0, 0.0]


def test_numbers_without_a_task_are_no_metrics(tmp_path):
    with pytest.raises(ConfigError, match="task/metric"):
        run(tmp_path, [1.0], metrics={"accuracy": 0.5})


def test_losses_are_best_where_they_are_least(tmp_path):
    run(tmp_path, [3.0, 1.0, 2.0], "TEST.BNEXT.BEST.MODE", "min")
    assert best_of(tmp_path) == 3


def test_a_training_that_gets_no_better_ends_with_the_next_iteration(tmp_path):
    evaluated, steps = run(tmp_path, [1.0, 3.0, 2.0, 3.0], "TEST.BNEXT.BEST.PATIENCE", 2)
    assert (steps[-1], evaluated) == (8, [1, 3, 5, 7, 8])
    assert best_of(tmp_path) == 3


def test_a_metric_without_a_number_does_not_end_a_training(tmp_path):
    _, steps = run(tmp_path, [math.nan], "TEST.BNEXT.BEST.PATIENCE", 1)
    assert len(steps) == 20
    assert not (tmp_path / "model_best.pth").exists()


def test_a_resume_remembers(tmp_path):
    values = [1.0, 3.0, 2.0, 2.5]
    patience = ("TEST.BNEXT.BEST.PATIENCE", 2)
    run(tmp_path, values, max_iter=6)  # interrupted after iteration 5, with an evaluation
    evaluated, steps = run(tmp_path, values, *patience, start=6)
    assert (steps, evaluated) == ([6, 7, 8], [7, 8])
    assert best_of(tmp_path) == 3

    assert run(tmp_path, values, *patience, start=8)[1] == [8], "interrupted before the last iteration"
    assert limit_iterations(tiny.load(tmp_path, *METRIC, *patience), 9, 20) == 9
    more = run(tmp_path, values, "TEST.BNEXT.BEST.PATIENCE", 4, start=9)[1]
    assert more == [9, 10]
    again, _ = run(tmp_path, [0.5], *patience)
    assert again == [1, 3, 5, 6], "a new training remembers nothing"


@pytest.mark.parametrize("content", ["", "[]", '{"metric": "bbox/AP50", "evaluations": []}', '{"evaluations": [1]}'])
def test_what_cannot_be_remembered_is_said(tmp_path, content, bnext_log):
    (tmp_path / "best.json").write_text(content)
    run(tmp_path, [1.0], start=18)
    assert "begins anew" in bnext_log.text
    assert best_of(tmp_path) == 19


def test_a_metric_that_an_evaluation_lacks_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"METRIC.*'bbox/AP'.*Did you mean .*'bbox/AP50'"):
        run(tmp_path, [0.0], metrics={"bbox": {"AP50": 1.0, "APs": 2.0}})
    evaluated, _ = run(tmp_path, [0.0], metrics={"bbox": {"AP50": math.nan}})
    assert evaluated, "without a detection there is no number of any metric"


@pytest.mark.parametrize(
    ("opts", "near"),
    [
        (("TEST.BNEXT.BEST.METRIC", "bbox/mAP"), "bbox/AP"),
        (("TEST.BNEXT.BEST.METRIC", "segm/AP"), "bbox/AP"),
        (("TEST.BNEXT.BEST.METRIC", "ema/bbox/AP"), r"Set SOLVER\.BNEXT\.EMA\.ENABLED"),
        (("TEST.BNEXT.BEST.METRIC", "validation_loss/total_loss"), r"Set TEST\.BNEXT\.VALIDATION_LOSS\.PERIOD"),
        (("TEST.BNEXT.BEST.METRIC", "bbox/AP", "DATASETS.TEST", "('digits_val','digits_train')"), "digits_val/bbox/AP"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_before_the_training(digits, tmp_path, opts, near):
    cfg = tiny.load(tmp_path, *METRIC, *opts)
    for refuse in (check_run, Trainer):
        with pytest.raises(ConfigError, match=rf"TEST\.BNEXT\.BEST\.METRIC.*{near}"):
            refuse(cfg)


@pytest.mark.parametrize("metric", ["bbox/AP50", "ema/bbox/APs", "validation_loss/total_loss", "bbox/AP-3"])
def test_a_metric_that_can_be_is_not(digits, tmp_path, metric):
    around = ("SOLVER.BNEXT.EMA.ENABLED", True, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 1)
    check_best_metric(tiny.load(tmp_path, *METRIC, *around, "TEST.BNEXT.BEST.METRIC", metric))


def test_the_end_follows_from_the_evaluations():
    values = [Evaluation(step, value) for step, value in ((9, 1.0), (19, None), (29, 2.0), (39, 1.0), (49, 3.0))]
    assert [find_end(values, patience, "max") for patience in (0, 1, 2)] == [None, 21, None]
    assert find_end([], 1, "max") is None


class Scripted(Trainer):
    """Evaluates as a script says, in a way of its own."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"mine": {"score": 1.0}}


def test_an_early_end_has_its_checkpoint_and_evaluation_and_nothing_is_left_to_train(digits, tmp_path, bnext_log):
    best = ("TEST.BNEXT.BEST.METRIC", "mine/score", "TEST.BNEXT.BEST.PATIENCE", 1, "TEST.EVAL_PERIOD", 1)
    cfg = tiny.load(tmp_path, *best, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 0)
    assert Scripted(cfg).train() == {"mine": {"score": 1.0}}
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert best_of(tmp_path) == 0
    assert [line["iteration"] for line in tiny.read_metrics(tmp_path)][-1] == 3

    trainer = Scripted(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert "Nothing is left to train" in bnext_log.text
    assert "TEST.BNEXT.BEST.PATIENCE 1; a larger one lets it go on" in bnext_log.text

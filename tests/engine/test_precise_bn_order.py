"""PreciseBN in a training: what is saved is the estimate and is what is evaluated, and the training does not notice.

Elsewhere the estimate came after the checkpoint (open-mmlab/mmaction2#524), and a saved file could not get one
(open-mmlab/mmpretrain PR#1386; see test_recompute_checkpoint.py).
"""

from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import build_model

from bnext.config import load_config
from bnext.engine import Trainer, train
from bnext.engine.precise_bn import PreciseBN, build_estimates, keeping_averages
from bnext.engine.validation_hook import ValidationLoss
from bnext.evaluation.reestimate import recompute_statistics
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
RCNN = tiny.RCNN
PRECISE = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1)
PERIODS = ("SOLVER.MAX_ITER", 7, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2)
BEFORE = "TEST.BNEXT.PRECISE_BN.BEFORE_CHECKPOINTS"
LOSS = "TEST.BNEXT.VALIDATION_LOSS"
RENORM = ("MODEL.BNEXT.RETINANET.TRAINING", "renorm")


def load(kind, output, *opts):
    if kind == "rcnn":
        return load_config(str(RCNN), ["OUTPUT_DIR", str(output), *map(str, opts)])
    return tiny.load(output, *opts, *RENORM)


def copy_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def differ(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


class Watcher(Trainer):
    """Keeps what is evaluated, by the number of iterations done."""

    def __init__(self, cfg):
        self.evaluated = {}
        super().__init__(cfg)

    def _evaluate_and_keep(self):
        self.evaluated[min(self.iter + 1, self.max_iter)] = copy_state(self.model)
        return {}


def estimate(cfg, state):
    """What a re-estimation makes of a state."""
    model = build_model(cfg)
    model.load_state_dict(state)
    recompute_statistics(cfg, model)
    return copy_state(model)


@pytest.fixture(scope="module")
def watched(digits, tmp_path_factory):
    """A training with PreciseBN: its config, what it evaluated, and what it saved."""
    cfg = tiny.load(tmp_path_factory.mktemp("watched"), *PRECISE, *PERIODS)
    trainer = Watcher(cfg)
    trainer.train()
    saved = {
        number: torch.load(Path(cfg.OUTPUT_DIR, f"{name}.pth"))["model"]
        for number, name in ((3, "model_0000002"), (6, "model_0000005"), (7, "model_final"))
    }
    return cfg, trainer.evaluated, saved


def test_what_is_saved_is_what_was_evaluated(watched):
    _, evaluated, saved = watched
    assert (sorted(evaluated), sorted(saved)) == ([2, 4, 6, 7], [3, 6, 7])
    for number in (6, 7):
        assert differ(evaluated[number], saved[number]) == []


def test_what_is_saved_and_what_is_evaluated_is_the_estimate_of_its_weights(watched):
    cfg, evaluated, saved = watched
    for state in (evaluated[4], saved[3], saved[7]):
        assert differ(estimate(cfg, state), state) == []


def test_without_the_key_a_checkpoint_between_evaluations_has_the_moving_average(digits, watched, tmp_path):
    cfg = tiny.load(tmp_path, *PRECISE, *PERIODS, BEFORE, False)
    trainer = Watcher(cfg)
    trainer.train()
    names = ("model_0000002", "model_0000005", "model_final")
    states = [torch.load(Path(tmp_path, f"{name}.pth"))["model"] for name in names]
    found = [differ(estimate(cfg, state), state) for state in states]
    assert [bool(names) for names in found] == [True, False, False]
    assert all(name.rpartition(".")[2].startswith(("running_", "num_batches")) for name in found[0])
    assert differ(states[2], watched[2][7]) == []


def test_every_validation_loss_is_of_the_estimate_of_its_weights(digits, tmp_path):
    """One curve tells of one kind of statistics, whatever is evaluated or saved in the same iteration."""
    opts = ("SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 3, "SOLVER.CHECKPOINT_PERIOD", 2, f"{LOSS}.PERIOD", 1)
    cfg = tiny.load(tmp_path, *PRECISE, *opts)
    trainer, states = Watcher(cfg), []
    place = next(i for i, hook in enumerate(trainer._hooks) if isinstance(hook, ValidationLoss))
    trainer.register_hooks([CallbackHook(after_step=lambda trainer: states.append(copy_state(trainer.model)))])
    trainer._hooks.insert(place, trainer._hooks.pop())
    trainer.train()
    assert [differ(estimate(cfg, state), state) for state in states] == [[], [], []]
    assert differ(states[2], trainer.evaluated[3]) == []
    assert differ(states[1], torch.load(tmp_path / "model_0000001.pth")["model"]) == []


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ((f"{LOSS}.PERIOD", 2), [1, 2, 3, 5]),
        ((f"{LOSS}.PERIOD", 0), [2, 5]),
        ((f"{LOSS}.PERIOD", 2, f"{LOSS}.STATISTICS", "mini_batch"), [2, 5]),
    ],
)
def test_a_validation_loss_asks_for_an_estimate_if_the_population_normalizes_it(tmp_path, opts, expected):
    cfg = tiny.load(tmp_path, *PRECISE, "TEST.EVAL_PERIOD", 3, BEFORE, False, *opts)
    model, done = torch.nn.BatchNorm2d(3), []
    (hook,) = build_estimates(cfg, model, lambda: done.append(hook.trainer.iter))
    for iteration in range(6):
        hook.trainer = type("T", (), {"model": model, "iter": iteration, "max_iter": 6})
        hook.before_step()
        hook.after_step()
    assert done == expected


def record_steps(cfg):
    """What each step of a training begins with: weights, statistics, optimizer; and what it reports."""
    trainer, steps = Trainer(cfg), []

    def keep(trainer):
        momentum = [own["momentum_buffer"].clone() for own in trainer.optimizer.state.values()]
        steps.append((copy_state(trainer.model), momentum))

    trainer.register_hooks([CallbackHook(before_step=keep)])
    trainer.train()
    kept = ("iteration", "total_loss", "lr")
    metrics = [{key: line[key] for key in kept if key in line} for line in tiny.read_metrics(cfg.OUTPUT_DIR)]
    return steps, [line for line in metrics if "total_loss" in line]


@pytest.mark.parametrize("kind", ["renorm", "rcnn"])
def test_a_training_is_bitwise_the_one_without_estimates(digits, tmp_path, kind):
    opts = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
    precise, precise_metrics = record_steps(load(kind, tmp_path / "precise", *opts, *PRECISE))
    plain, plain_metrics = record_steps(load(kind, tmp_path / "plain", *opts))
    assert len(precise) == len(plain) == 6
    for (state, momentum), (other, other_momentum) in zip(precise, plain, strict=True):
        assert differ(state, other) == []
        assert all(torch.equal(a, b) for a, b in zip(momentum, other_momentum, strict=True))
    assert precise_metrics == plain_metrics != []
    paths = (tmp_path / name / "model_0000001.pth" for name in ("precise", "plain"))
    saved, other = (torch.load(path)["model"] for path in paths)
    names = {name.rpartition(".")[2] for name in differ(saved, other)}
    assert {"running_mean", "running_var"} <= names <= {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("kind", ["renorm", "rcnn"])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(digits, tmp_path, kind):
    opts = (*PRECISE, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
    whole, resumed = (load(kind, tmp_path / name, *opts) for name in ("whole", "resumed"))
    train(whole)
    tiny.train_until(resumed, 3)
    train(resumed, resume=True)
    first, second = (torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth")) for cfg in (whole, resumed))
    assert differ(first["model"], second["model"]) == []
    averages = [file["trainer"]["hooks"]["PreciseBN"]["averages"] for file in (first, second)]
    assert averages[0]
    assert differ(*averages) == []


def test_averages_of_other_norms_are_left_out_of_a_resume(bnext_log):
    model = torch.nn.BatchNorm2d(3)
    hook = PreciseBN(lambda: None)
    hook.trainer = type("T", (), {"model": model, "iter": 4})
    hook.load_state_dict({"averages": {"running_mean": torch.ones(5)}})
    hook.before_step()
    assert not model.running_mean.any()
    assert "go on from the estimate" in bnext_log.text
    hook.load_state_dict({"averages": {name: value + 1 for name, value in model.named_buffers()}})
    hook.before_step()
    assert bool((model.running_mean == 1).all())


def fail_after(model):
    model(torch.randn(4, 3, 2, 2) + 1)
    model(torch.randn(4))


def test_averages_are_kept_also_by_an_exception():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, affine=False))
    before = copy_state(model)
    with pytest.raises(ValueError, match="expected 4D"), keeping_averages(model):
        fail_after(model)
    assert differ(copy_state(model), before) == []

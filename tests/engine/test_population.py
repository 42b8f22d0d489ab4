"""Population statistics in a training: what is saved is the estimate and is what is evaluated; the training goes on.

Elsewhere the estimate came after the checkpoint (open-mmlab/mmaction2#524), and a saved file could not get one
(open-mmlab/mmpretrain PR#1386; see tests/cli/test_reestimate.py). Two workers: test_two_workers.py.
"""

from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import build_model
from torch import nn

from bnext.data.batches import build_validation_batches
from bnext.engine import Trainer, train
from bnext.engine.population import (
    PreciseBN,
    build_estimates,
    count_batches,
    normalizing_by_mini_batch,
)
from bnext.engine.validation_hook import ValidationLoss, build_validation_loss
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import recompute_statistics
from bnext.layers import BatchNorm2d, NormSpec
from bnext.scope.model import setting
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
PRECISE = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1)
PERIODS = ("SOLVER.MAX_ITER", 7, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2)
BEFORE = "TEST.BNEXT.PRECISE_BN.BEFORE_CHECKPOINTS"
LOSS = "TEST.BNEXT.VALIDATION_LOSS"
SMART = ("TEST.BNEXT.SMART_BATCH_NORM", True)
FREEZE = "SOLVER.BNEXT.FREEZE"


def copy_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def differ(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def load_state(folder, name):
    return torch.load(Path(folder, f"{name}.pth"))["model"]


class Watcher(Trainer):
    """Keeps what is evaluated, and what normalizes it, by the number of iterations done."""

    def __init__(self, cfg):
        self.evaluated, self.inference = {}, {}
        super().__init__(cfg)

    def test(self, cfg, model, evaluators=None):
        number = min(self.iter + 1, self.max_iter)
        self.evaluated[number] = copy_state(model)
        self.inference[number] = find_what_normalizes(model)
        return {}


def find_what_normalizes(model):
    """The statistics that normalize in the first norm of a model in evaluation mode."""
    norm = next(module for module in model.modules() if isinstance(module, BatchNorm2d))
    with torch.no_grad(), setting([norm], training=False):
        output = norm(torch.randn(2, norm.num_features, 3, 3) * 2 + 9)
    return "mini_batch" if output.mean().abs() < 1e-5 else "population"


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
    names = {3: "model_0000002", 6: "model_0000005", 7: "model_final"}
    return cfg, trainer.evaluated, {number: load_state(cfg.OUTPUT_DIR, name) for number, name in names.items()}


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
    Watcher(cfg).train()
    states = [load_state(tmp_path, name) for name in ("model_0000002", "model_0000005", "model_final")]
    differences = [differ(estimate(cfg, state), state) for state in states]
    assert [bool(names) for names in differences] == [True, False, False]
    assert all(name.rpartition(".")[2].startswith(("running_", "num_batches")) for name in differences[0])
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
    assert differ(states[1], load_state(tmp_path, "model_0000001")) == []


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ((f"{LOSS}.PERIOD", 2), [1, 2, 3, 5]),  # the population normalizes it
        ((f"{LOSS}.PERIOD", 0), [2, 5]),
        ((f"{LOSS}.PERIOD", 2, f"{LOSS}.STATISTICS", "mini_batch"), [2, 5]),
        ((f"{FREEZE}.ITER", 5), [2, 4]),  # right before, then never again
        ((f"{FREEZE}.ITER", 3), [2]),  # once, though both ask for it
        ((f"{FREEZE}.ITER", 5, f"{FREEZE}.WHAT", "affine"), [2, 5]),
    ],
)
def test_when_there_is_an_estimate(tmp_path, opts, expected):
    cfg = tiny.load(tmp_path, *PRECISE, "TEST.EVAL_PERIOD", 3, BEFORE, False, *opts)
    model, calls = nn.BatchNorm2d(3), []
    (hook,) = build_estimates(cfg, model)
    hook._recompute = lambda: calls.append(hook.trainer.iter)
    for iteration in range(6):
        hook.trainer = type("T", (), {"model": model, "iter": iteration, "max_iter": 6})
        hook.before_step()
        hook.after_step()
    assert calls == expected


def test_the_estimate_before_a_freeze_stays():
    model = nn.BatchNorm2d(3)
    hook = PreciseBN(lambda: model.running_mean.fill_(7), 1, frozen_from=1)
    seen = []
    for iteration in range(3):
        hook.trainer = type("T", (), {"model": model, "iter": iteration, "max_iter": 3})
        hook.before_step()
        seen.append(float(model.running_mean[0]))
        hook.after_step()
    assert seen == [0, 7, 7]


LONG = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")


def load_long(kind, output, *opts):
    if kind == "rcnn":
        return tiny.load(output, *LONG, *opts, config=tiny.RCNN)
    return tiny.load(output, *LONG, *opts, "MODEL.BNEXT.RETINANET.TRAINING", "renorm")


def record_steps(cfg):
    """What each step of a training begins with: weights, statistics, optimizer; and what it reports."""
    trainer, steps = Trainer(cfg), []

    def keep(trainer):
        momentum = [state["momentum_buffer"].clone() for state in trainer.optimizer.state.values()]
        steps.append((copy_state(trainer.model), momentum))

    trainer.register_hooks([CallbackHook(before_step=keep)])
    trainer.train()
    metrics = [line for line in tiny.read_metrics(cfg.OUTPUT_DIR) if "total_loss" in line]
    return steps, [(line["iteration"], line["total_loss"], line["lr"]) for line in metrics]


@pytest.fixture(scope="module", params=["renorm", "rcnn"])
def precise(request, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precise")
    return request.param, folder, record_steps(load_long(request.param, folder, *PRECISE))


def test_a_training_is_bitwise_the_one_without_estimates(precise, tmp_path):
    kind, folder, (steps, metrics) = precise
    plain, plain_metrics = record_steps(load_long(kind, tmp_path))
    assert len(steps) == len(plain) == 6
    for (state, momentum), (other, other_momentum) in zip(steps, plain, strict=True):
        assert differ(state, other) == []
        assert all(torch.equal(a, b) for a, b in zip(momentum, other_momentum, strict=True))
    assert metrics == plain_metrics != []
    saved, other = (load_state(path, "model_0000001") for path in (folder, tmp_path))
    names = {name.rpartition(".")[2] for name in differ(saved, other)}
    assert {"running_mean", "running_var"} <= names <= {"running_mean", "running_var", "num_batches_tracked"}


def test_a_resumed_training_is_bitwise_the_uninterrupted_one(precise, tmp_path):
    kind, folder, _ = precise
    cfg = load_long(kind, tmp_path, *PRECISE)
    tiny.train_until(cfg, 3)
    train(cfg, resume=True)
    files = [torch.load(path / "model_final.pth") for path in (folder, tmp_path)]
    assert differ(*(file["model"] for file in files)) == []
    averages = [file["trainer"]["hooks"]["PreciseBN"]["averages"] for file in files]
    assert averages[0]
    assert differ(*averages) == []


def test_averages_of_other_norms_are_left_out_of_a_resume(bnext_log):
    model = nn.BatchNorm2d(3)
    hook = PreciseBN(lambda: None)
    hook.trainer = type("T", (), {"model": model, "iter": 4})
    hook.load_state_dict({"averages": {"running_mean": torch.ones(5)}})
    hook.before_step()
    assert not model.running_mean.any()
    assert "go on from the estimate" in bnext_log.text
    hook.load_state_dict({"averages": {name: value + 1 for name, value in model.named_buffers()}})
    hook.before_step()
    assert bool((model.running_mean == 1).all())


@pytest.fixture(scope="module")
def smart(digits, tmp_path_factory):
    """A training with smart batch norm, and what it evaluated."""
    cfg = tiny.load(tmp_path_factory.mktemp("smart"), *SMART, "TEST.EVAL_PERIOD", 2)
    trainer = Watcher(cfg)
    trainer.train()
    return cfg, trainer


def test_mini_batches_normalize_all_evaluations_but_the_last(smart):
    assert smart[1].inference == {2: "mini_batch", 4: "mini_batch", 6: "population"}


def test_what_is_saved_last_is_the_estimate_of_one_epoch_and_is_what_is_evaluated(smart):
    cfg, trainer = smart
    final = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    assert differ(final["model"], trainer.evaluated[6]) == []
    assert count_batches(cfg) == 3
    counters = {int(value) for name, value in final["model"].items() if name.endswith("num_batches_tracked")}
    assert counters == {3}
    assert {spec["inference"] for spec in final["norm_specs"].values()} == {"population"}


def test_weights_are_those_of_a_training_without_it(smart, finished):
    first, second = (load_state(cfg.OUTPUT_DIR, "model_final") for cfg in (smart[0], finished[0]))
    kinds = {name.rpartition(".")[2] for name in differ(first, second)}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_validation_loss_is_by_mini_batches_until_the_end(digits, tmp_path):
    hook = build_validation_loss(tiny.load(tmp_path, *SMART, f"{LOSS}.PERIOD", 2))[0]
    assert [hook._statistics(iteration) for iteration in (1, 3, 5)] == ["mini_batch", "mini_batch", "population"]


def test_a_config_without_batch_norm_is_refused_before_training(digits, tmp_path):
    opts = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "", *tiny.NO_LEVELS)
    with pytest.raises(ConfigError, match="SMART_BATCH_NORM"):
        Trainer(tiny.load(tmp_path, *SMART, *opts))


def test_rois_of_each_image_are_a_mini_batch(digits, tmp_path):
    cfg = tiny.load(tmp_path, config=tiny.RCNN)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    records = [record for batch in build_validation_batches(cfg, "digits_val") for record in batch][:2]
    outputs = []
    model.roi_heads.box_head.conv1.norm.register_forward_hook(lambda norm, args, output: outputs.append(output))
    with torch.no_grad():
        with normalizing_by_mini_batch(model):
            model(records)
        model(records)
    by_mini_batch, by_population = (output.split(len(output) // 2) for output in outputs)
    assert len(by_mini_batch) == 2
    for rois, other in zip(by_mini_batch, by_population, strict=True):
        torch.testing.assert_close(rois.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-5)
        assert float(other.mean((0, 2, 3)).abs().max()) > 0.01


def test_the_scope_ends_also_by_an_exception():
    specs = (NormSpec(), NormSpec(training="renorm"), NormSpec(frozen="statistics"))
    model = nn.ModuleList(BatchNorm2d(3, spec) for spec in specs)

    def fail():
        assert [find_what_normalizes(norm) for norm in model] == ["mini_batch", "population", "population"]
        raise KeyError

    with pytest.raises(KeyError), normalizing_by_mini_batch(model):
        fail()
    assert [find_what_normalizes(norm) for norm in model] == ["population"] * 3


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3)), "another at 1"),
        (nn.Sequential(BatchNorm2d(3, NormSpec(frozen="both"))), "none"),
        (nn.BatchNorm2d(3), "another at its root"),
    ],
)
def test_models_without_norms_that_it_could_change_are_refused(model, got):
    with pytest.raises(ConfigError, match=f"got {got} "), normalizing_by_mini_batch(model):
        pass

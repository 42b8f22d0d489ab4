"""Norms that change during a training: what moves, what does not, and that a resume is exact."""

import itertools
import logging

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine import hooks as d2_hooks
from detectron2.layers import CycleBatchNormList
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from bnext.engine import Trainer, train
from bnext.engine.hooks import EqualizeBuffers, PeriodicCheckpointer
from bnext.engine.norm_schedules import FreezeNorms, NormSchedule
from bnext.engine.population import PreciseBN
from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.spec import NormSpec
from tests import tiny

FREEZE = "SOLVER.BNEXT.FREEZE"


def load(output, *opts):
    """The tiny config without a test set, and overrides."""
    return tiny.load(output, "DATASETS.TEST", "()", *opts)


class Net(nn.Module):
    """Norms of several kinds, and a convolution."""

    def __init__(self, spec=None):
        super().__init__()
        self.ours = BatchNorm2d(3, spec)
        self.theirs = nn.BatchNorm2d(3)
        self.cycle = CycleBatchNormList(2, num_features=3)
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.theirs(self.ours(x))
        return {"loss": self.conv(self.cycle(x) + self.cycle(x + 1)).square().mean()}


class Watch(d2_hooks.HookBase):
    """Keeps the state and the learning rate of every iteration."""

    def __init__(self):
        self.states, self.rates = [], []

    def before_train(self):
        self.trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: self.rates.append(self.rate(optimizer)))

    @staticmethod
    def rate(optimizer):
        return optimizer.param_groups[0]["lr"]

    def after_step(self):
        self.trainer.model.train()  # as an evaluation does
        self.states.append({key: value.clone() for key, value in self.trainer.model.state_dict().items()})


def run(*hooks, iterations=6, spec=None, clip=False):
    """Train a `Net` with momentum and weight decay; what was seen."""
    torch.manual_seed(0)
    model, watch = Net(spec), Watch()
    data = [torch.randn(4, 3, 5, 5) * 2 + 1 for _ in range(iterations)]
    kind = torch.optim.SGD
    if clip:
        kind = maybe_add_gradient_clipping(load("", "SOLVER.CLIP_GRADIENTS.ENABLED", True), kind)
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    trainer = SimpleTrainer(model, data, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)  # takes the optimizer's rate on
    trainer.register_hooks([d2_hooks.LRScheduler(scheduler=scheduler), *hooks, watch])
    trainer.train(0, iterations)
    watch.logged = trainer.storage.history("lr").values()
    watch.model, watch.optimizer = model, optimizer
    return watch


def moving(watch, start):
    """Names of what changes from the iteration before `start` on."""
    steps = itertools.pairwise(watch.states[start - 1 :])
    changed = [{key for key in old if not torch.equal(old[key], new[key])} for old, new in steps]
    assert all(names == changed[0] for names in changed)
    return changed[0]


CONV = {"conv.weight", "conv.bias"}
AFFINE = {f"{norm}.{name}" for norm in ("ours", "theirs", "cycle") for name in ("weight", "bias")}
NORMS = ("ours", "theirs", "cycle.0", "cycle.1")
STATISTICS = {f"{norm}.{name}" for norm in NORMS for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize(
    ("what", "left", "clip"),
    [
        ("both", CONV, False),
        ("both", CONV, True),
        ("statistics", CONV | AFFINE, False),
        ("affine", CONV | STATISTICS, True),
    ],
)
def test_frozen_parts_stay_bitwise_from_the_iteration_on(what, left, clip):
    watch = run(FreezeNorms(3, what), clip=clip)
    assert moving(watch, 3) == left
    before = run(clip=clip)
    assert all(torch.equal(watch.states[2][key], value) for key, value in before.states[2].items())


def test_frozen_norms_normalize_by_the_population():
    first, second = run(FreezeNorms(3)), run(FreezeNorms(3), spec=NormSpec(training="renorm"))
    assert first.model.ours.spec.frozen == "statistics"
    x = torch.randn(4, 3, 5, 5)
    for watch in (first, second):
        train_mode = watch.model.ours.train()(x)
        assert torch.equal(train_mode, watch.model.ours.eval()(x))


@pytest.mark.parametrize("clip", [False, True])
def test_the_learning_rate_warms_up_by_a_factor_of_the_schedules(clip):
    watch = run(FreezeNorms(2, warmup_iters=3), clip=clip)
    expected = [0.1, 0.1, 0.1 / 4, 0.1 / 2, 0.05 * 3 / 4, 0.05]
    logged = {iteration: value for value, iteration in watch.logged}  # the last one of an iteration counts
    assert list(logged.values()) == pytest.approx(expected)
    used = watch.rates[:: 2 if clip else 1]
    assert used == pytest.approx(expected)
    assert Watch.rate(watch.optimizer) == pytest.approx(0.05)


def test_norms_without_population_statistics_are_told(bnext_log):
    bnext_log.set_level(logging.INFO)
    run(FreezeNorms(3), spec=NormSpec(population="none", inference="mini_batch"))
    assert "1 norms have no population statistics to freeze (ours, ...)" in bnext_log.text
    assert "frozen from iteration 3 on: the statistics of 3 norms" in bnext_log.text


def test_momentum_and_limits_follow_their_points():
    seen = []

    class Look(d2_hooks.HookBase):
        def before_step(self):
            norm = self.trainer.model.ours
            seen.append((norm.momentum, self.trainer.model.theirs.momentum, norm.r_max, norm.d_max))

    schedule = NormSchedule(momentum=[(0, 0.5), (4, 0.1)], r_max=[(1, 1), (3, 3)], d_max=[(0, 0)])
    run(schedule, Look(), spec=NormSpec(training="renorm"))
    assert [row[0] for row in seen] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert [row[1] for row in seen] == [row[0] for row in seen]
    assert [row[2:] for row in seen] == [(1, 0), (1, 0), (2, 0), (3, 0), (3, 0), (3, 0)]


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (lambda: FreezeNorms(-1), "iteration"),
        (lambda: FreezeNorms(0, warmup_iters=-2), "warmup_iters"),
        (lambda: FreezeNorms(0, "all"), "what"),
        (lambda: NormSchedule(momentum=[]), "momentum"),
        (lambda: NormSchedule(d_max=[(0, -1)]), "d_max"),
    ],
)
def test_hooks_refuse_wrong_values(hook, name):
    with pytest.raises(ConfigError, match=f"^{name} must"):
        hook()


@pytest.mark.parametrize(
    ("opts", "key"),
    [
        ((f"{FREEZE}.ITER", 6), "FREEZE.ITER"),
        ((f"{FREEZE}.ITER", -2), "FREEZE.ITER"),
        ((f"{FREEZE}.ITER", 1, f"{FREEZE}.WHAT", "gamma"), "FREEZE.WHAT"),
        ((f"{FREEZE}.ITER", 1, f"{FREEZE}.WARMUP_ITERS", -1), "FREEZE.WARMUP_ITERS"),
        ((f"{FREEZE}.WARMUP_ITERS", 5), "FREEZE.WARMUP_ITERS"),
        (("SOLVER.BNEXT.MOMENTUM", "[[0, 0.0]]"), "MOMENTUM"),
        (("SOLVER.BNEXT.RENORM.R_MAX", "[[0, 0.5]]"), "RENORM.R_MAX"),
        (("SOLVER.BNEXT.RENORM.D_MAX", "[[0, -1]]"), "RENORM.D_MAX"),
    ],
)
def test_keys_refuse_wrong_values(opts, key):
    with pytest.raises(ConfigError, match=rf"SOLVER\.BNEXT\.{key}"):
        load("", *opts)


# A model without a batch norm that moves.
NO_NORM = (*tiny.NO_LEVELS, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "")


@pytest.mark.parametrize(
    ("opts", "key"),
    [
        (("SOLVER.BNEXT.RENORM.R_MAX", "[[0, 1]]"), "RENORM"),
        ((f"{FREEZE}.ITER", 2, *NO_NORM), "FREEZE"),
        (("SOLVER.BNEXT.MOMENTUM", "[[0, 0.1]]", *NO_NORM), "MOMENTUM"),
    ],
)
def test_keys_without_effect_are_refused_before_training(digits, tmp_path, opts, key):
    with pytest.raises(ConfigError, match=rf"SOLVER\.BNEXT\.{key}"):
        Trainer(load(tmp_path, *opts))


SCHEDULED = (f"{FREEZE}.ITER", 4, f"{FREEZE}.WARMUP_ITERS", 2, "SOLVER.BNEXT.MOMENTUM", "[[0, 0.3], [4, 0.05]]")
SCHEDULED += ("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 8, "SOLVER.WEIGHT_DECAY_NORM", 0.001)
SCHEDULED += ("SOLVER.BNEXT.RENORM.R_MAX", "[[1, 1], [3, 2]]", "SOLVER.BNEXT.RENORM.D_MAX", "[[1, 0], [3, 1]]")
SCHEDULED += ("MODEL.BNEXT.RETINANET.TRAINING", "renorm")
SCHEDULED += ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1)


def test_hooks_are_there_where_keys_ask_for_them_and_in_their_order(digits, tmp_path):
    kinds = [type(hook) for hook in Trainer(load(tmp_path, *SCHEDULED))._hooks]
    order = [d2_hooks.LRScheduler, PreciseBN, FreezeNorms, NormSchedule, NormSchedule]
    order += [EqualizeBuffers, PeriodicCheckpointer]
    assert [kind for kind in kinds if kind in order] == order
    kinds = [type(hook) for hook in Trainer(load(tmp_path))._hooks]
    assert not {PreciseBN, FreezeNorms, NormSchedule} & set(kinds)


@pytest.fixture(scope="module")
def scheduled(digits, tmp_path_factory):
    """The output of a whole training with schedules."""
    folder = tmp_path_factory.mktemp("scheduled")
    train(load(folder, *SCHEDULED))
    return folder


def weights(folder, name):
    return torch.load(folder / f"{name}.pth")["model"]


@pytest.mark.parametrize("stop", [5, 7])  # resumes from iteration 4 and 6: at and after the freezing
def test_a_resumed_training_is_the_uninterrupted_one(scheduled, tmp_path, stop):
    cfg = load(tmp_path, *SCHEDULED)
    tiny.train_until(cfg, stop)
    train(cfg, resume=True)
    whole, resumed = weights(scheduled, "model_final"), weights(tmp_path, "model_final")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    last, again = tiny.read_metrics(scheduled), tiny.read_metrics(tmp_path)
    assert again[-1] == last[-1]


def test_a_detector_trains_on_with_frozen_norms(scheduled):
    before, at, final = (weights(scheduled, name) for name in ("model_0000003", "model_0000005", "model_final"))
    norms = [key for key in final if ".norm." in key or "_subnet.1." in key or "running" in key]
    assert len(norms) > 50
    assert [key for key in norms if not torch.equal(before[key], final[key])] == []
    others = [key for key in final if key.endswith("weight") and key not in norms and not key.startswith("pixel")]
    assert [key for key in others if torch.equal(at[key], final[key])] == []


def test_statistics_are_re_estimated_before_they_are_frozen(scheduled, tmp_path):
    train(load(tmp_path, *SCHEDULED, "TEST.PRECISE_BN.ENABLED", False))
    with_estimate, without = weights(scheduled, "model_0000003"), weights(tmp_path, "model_0000003")
    different = {key.rpartition(".")[2] for key in without if not torch.equal(without[key], with_estimate[key])}
    assert {"running_mean", "running_var"} <= different <= {"running_mean", "running_var", "num_batches_tracked"}

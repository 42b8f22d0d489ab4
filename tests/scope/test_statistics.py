"""`frozen_statistics`: forwards that are no training leave every running statistic bit by bit."""

import warnings

import pytest
import torch
from torch import nn

from bnext.layers import BatchNorm2d, NormSpec
from bnext.scope import frozen_statistics, use_domain
from bnext.scope.model import restoring
from tests.cases import CASES, NUM_CHANNELS, make_features, make_norm, randomize


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unmoved(model, before):
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def assert_moves(model, x):
    before = state_of(model)
    model(x)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_nothing_moves_and_the_outputs_are_those_of_training(case):
    """ultralytics/ultralytics PR#18149: elsewhere a dummy forward destroys running statistics."""
    norm, free = case.build().train(), case.build().train()
    before = state_of(norm)
    with frozen_statistics(norm):
        outputs = case.call(norm, case.inputs(requires_grad=True))
        again = case.call(norm, case.inputs())
    expected = case.call(free, case.inputs())
    for name in case.names:
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-14)
        assert torch.equal(outputs[name], again[name])
    sum(output.square().sum() for output in outputs.values()).backward()  # what ran in the scope has its backward
    assert_unmoved(norm, before)
    case.call(norm, case.inputs())
    moved = {name for name, buffer in norm.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == case.moving_buffers(norm)


def make_models():
    """Norms of others, too."""
    naive = pytest.importorskip("detectron2.layers").NaiveSyncBatchNorm
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1)
    return {
        "torch": nn.Sequential(conv, nn.BatchNorm2d(NUM_CHANNELS), nn.ReLU(), nn.BatchNorm2d(NUM_CHANNELS)),
        "torch_cumulative": nn.BatchNorm2d(NUM_CHANNELS, momentum=None),
        "torch_without_affine": nn.BatchNorm2d(NUM_CHANNELS, affine=False),
        "torch_1d": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(NUM_CHANNELS)),
        "torch_sync": nn.Sequential(conv, nn.SyncBatchNorm(NUM_CHANNELS)),
        "naive_sync": nn.Sequential(conv, naive(NUM_CHANNELS)),
        "ignores_the_flag": nn.Sequential(conv, IgnoresTheFlag(NUM_CHANNELS)),
        "assigns_anew": nn.Sequential(conv, AssignsAnew(NUM_CHANNELS)),
        "instance": nn.InstanceNorm2d(NUM_CHANNELS, track_running_stats=True),
        "own": nn.Sequential(conv, BatchNorm2d(NUM_CHANNELS), BatchNorm2d(NUM_CHANNELS, NormSpec(training="renorm"))),
    }


class IgnoresTheFlag(nn.BatchNorm2d):
    """Updates by hand, as some projects' norms do."""

    def forward(self, input):
        if self.training:
            self.running_mean += 0.1 * (input.mean((0, 2, 3)).detach() - self.running_mean)
            self.num_batches_tracked += 1
        return input - self.running_mean[:, None, None]


class AssignsAnew(nn.BatchNorm2d):
    """Its buffer is another tensor after each call."""

    def forward(self, input):
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * input.mean((0, 2, 3)).detach()
        return input - self.running_mean[:, None, None]


@pytest.mark.parametrize("name", make_models())
def test_norms_of_others_are_left_alone_too(name):
    model, x = make_models()[name].train(), torch.randn(4, NUM_CHANNELS, 3, 3)
    before = state_of(model)
    with frozen_statistics(model):
        output = model(x.requires_grad_())
    assert_unmoved(model, before)
    output.square().sum().backward()
    assert_moves(model, x)


@pytest.mark.parametrize("name", ["torch", "own", "ignores_the_flag"])
def test_an_exception_restores(name):
    model, x = make_models()[name].train(), torch.randn(4, NUM_CHANNELS, 3, 3)
    before, flags = state_of(model), [getattr(m, "track_running_stats", None) for m in model.modules()]
    with pytest.raises(KeyError), frozen_statistics(model):
        raise KeyError(model(x).sum())
    assert_unmoved(model, before)
    assert flags == [getattr(m, "track_running_stats", None) for m in model.modules()]
    assert_moves(model, x)


@pytest.mark.parametrize("scope", [frozen_statistics, restoring])
def test_buffers_that_cannot_be_copied_are_no_obstacle(scope):
    """Those of a lazy norm before its first call, of one that is expanded, of a scripted module."""
    expanded = nn.BatchNorm2d(NUM_CHANNELS)
    expanded.register_buffer("shared", torch.zeros(1).expand(NUM_CHANNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(nn.BatchNorm2d(NUM_CHANNELS))
    lazy = nn.LazyBatchNorm2d()

    model = nn.Sequential(expanded, scripted, nn.BatchNorm2d(NUM_CHANNELS), lazy).train()
    before = state_of(model[:3])
    with scope(model):
        model[:3](torch.randn(2, NUM_CHANNELS, 2, 2))
    assert_unmoved(model[:3], before)

    with scope(nn.Sequential(lazy)):
        lazy(torch.randn(2, NUM_CHANNELS, 2, 2))
    assert lazy.running_mean.shape == (NUM_CHANNELS,)
    assert scope is restoring or not lazy.running_mean.any(), "a forward that finds shapes moves nothing"


def test_scopes_nest_and_a_norm_without_statistics_stays_so():
    model = nn.Sequential(nn.BatchNorm2d(NUM_CHANNELS), nn.BatchNorm2d(NUM_CHANNELS, track_running_stats=False))
    with frozen_statistics(model):
        with frozen_statistics(model[0]):
            model(torch.randn(2, NUM_CHANNELS, 2, 2))
        before = state_of(model)
        model(torch.randn(2, NUM_CHANNELS, 2, 2))
        assert_unmoved(model, before)
    assert (model[0].track_running_stats, model[1].track_running_stats) == (True, False)


def test_only_the_model_that_is_named():
    frozen, free = make_norm(NormSpec.from_table5_row(2)).train(), make_norm(NormSpec.from_table5_row(2)).train()
    before = state_of(frozen)
    with frozen_statistics(frozen):
        frozen(make_features())
        free(make_features())
    assert_unmoved(frozen, before)
    assert int(free.p3.num_batches_tracked) == 8


def test_in_evaluation_mode_the_population_normalizes_as_ever():
    """torch normalizes by the mini-batch where statistics are not tracked, in evaluation mode too - if it has none."""
    for norm in (randomize(nn.BatchNorm2d(NUM_CHANNELS)), randomize(BatchNorm2d(NUM_CHANNELS))):
        x = torch.randn(4, NUM_CHANNELS, 3, 3)
        expected = norm.eval()(x)
        with frozen_statistics(norm):
            assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_validation_loss_in_training_mode_leaves_every_buffer(case):
    """detectron2#810, #1857: the validation loss of a detector needs training mode."""
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1).double()
    model = nn.ModuleDict({"conv": conv, "own": case.build(), "torchs": nn.BatchNorm2d(NUM_CHANNELS).double()}).train()
    before = state_of(model)
    with torch.no_grad(), frozen_statistics(model):
        for seed in range(2):
            features = {name: model["torchs"](model["conv"](x)) for name, x in case.inputs(seed).items()}
            assert all(torch.isfinite(output).all() for output in case.call(model["own"], features).values())
    assert_unmoved(model, before)
    assert all(module.training for module in model.modules())


def test_domains_within_a_frozen_scope():
    spec = NormSpec(population="per_domain", domains=("day", "night"))
    norm = randomize(BatchNorm2d(NUM_CHANNELS, spec)).train()
    before = state_of(norm)
    with frozen_statistics(norm), use_domain(["day", "night"]):
        norm(torch.randn(2, NUM_CHANNELS, 2, 2))
    assert_unmoved(norm, before)


@pytest.mark.parametrize("scope", [frozen_statistics, restoring])
def test_a_model_that_is_moved_in_the_scope_stays_whole(scope):
    model = nn.Sequential(nn.Conv2d(3, NUM_CHANNELS, 1), nn.BatchNorm2d(NUM_CHANNELS)).train()
    with scope(model):
        model.double()
        model(torch.randn(2, 3, 4, 4).double())
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert not model[1].running_mean.any()
    model.eval()(torch.randn(2, 3, 4, 4).double())

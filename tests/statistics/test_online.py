"""Statistics that follow the stream at test time: both forms against their definition, and the way back."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext import StatisticsError, following_stream, use_domain
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, make_features, make_norm, randomize
from tests.statistics.models import assert_as_before, batches, make_net, snapshot
from tests.workers import run_workers

EXACT = {"rtol": 1e-12, "atol": 1e-12}
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="shared", domains=("day", "night"))


def make_bn():
    return randomize(nn.BatchNorm2d(NUM_CHANNELS).double()).eval()


def read(state):
    return torch.stack([state.running_mean, state.running_var])


def measure(data):
    count, mean, var = reference.moments_of(data)
    return torch.stack([mean, var * count / (count - 1)])


def test_following_by_momentum_is_its_definition():
    bn, data = make_bn(), batches()
    before, expected = snapshot(bn), read(bn)
    with following_stream(bn, momentum=0.3) as following:
        for batch in data:
            output = bn(batch)
            expected = 0.7 * expected + 0.3 * measure([batch])
            torch.testing.assert_close(read(bn), expected, **EXACT)
            weights = bn.weight.detach(), bn.bias.detach()
            normalized = reference.inference_norm(batch, *expected, *weights, bn.eps)
            torch.testing.assert_close(output.detach(), normalized, rtol=1e-10, atol=1e-10)
        assert following.num_batches == 4
    assert_as_before(bn, before)


@pytest.mark.parametrize("source_samples", [0, 2.5, 16])
def test_following_by_samples_is_its_definition(source_samples):
    bn, data = make_bn(), batches()
    before, source = snapshot(bn), read(bn)
    with following_stream(bn, momentum=None, source_samples=source_samples):
        for number in range(1, 5):
            bn(data[number - 1])
            seen = sum(map(len, data[:number]))
            expected = (source_samples * source + seen * measure(data[:number])) / (source_samples + seen)
            torch.testing.assert_close(read(bn), expected, **EXACT)
    assert_as_before(bn, before)


@pytest.mark.parametrize("arguments", [{"momentum": 0.3}, {"momentum": None, "source_samples": 4}])
def test_reset_begins_anew_from_the_source(arguments):
    bn, data = make_bn(), batches()
    source = read(bn)
    with following_stream(bn, **arguments) as following:
        bn(data[0])
        first = read(bn)
        bn(data[1])
        following.reset()
        assert torch.equal(read(bn), source)
        assert following.num_batches == 0
        bn(data[0])
        assert torch.equal(read(bn), first)


@pytest.mark.parametrize("arguments", [{"momentum": 1.0}, {"momentum": None, "source_samples": 0}])
def test_a_bound_keeps_statistics_near_their_source(arguments):
    bn, data = make_bn(), batches()
    (mean, var), bound = read(bn), 3.0
    with following_stream(bn, bound=bound, **arguments):
        bn(data[0] * 100 + 500)
        reach = bound * (var + bn.eps).sqrt()
        torch.testing.assert_close(bn.running_mean, mean + reach, **EXACT)
        torch.testing.assert_close(bn.running_var, (var + bn.eps) * bound**2, **EXACT)
        bn(data[0] * 0)
        assert (bn.running_mean >= mean - reach).all()
        assert (bn.running_var >= (var + bn.eps) / bound**2 - bn.eps - 1e-12).all()


def test_a_stream_of_one_image_is_said(caplog):
    bn, data = make_bn(), batches()
    with following_stream(bn) as following:
        bn(data[0][:1])
        assert following.num_samples == 1
    assert "a single sample" in caplog.text
    caplog.clear()
    with following_stream(bn):
        bn(data[0][:1]), bn(data[0][:1])
    assert not caplog.records


@pytest.mark.parametrize("error", [None, RuntimeError("lost"), KeyboardInterrupt()])
def test_the_model_is_bitwise_as_before(error):
    net, data = make_net().eval(), batches()
    before = snapshot(net)
    leaving = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with leaving, following_stream(net):
        net(data[0])
        assert not torch.equal(net.second.running_var, before[0]["second.running_var"])
        net.train()
        if error is not None:
            net(error)
    assert_as_before(net, before)


def test_not_finite_activations_are_named_and_not_taken_in():
    net = make_net().eval()
    before = snapshot(net)
    with following_stream(net):
        net(batches()[0])
        followed = read(net.second)
        with pytest.raises(StatisticsError, match=r"activations must be finite; got NaN or Inf \(first\)"):
            net(batches()[1] * float("nan"))
        assert torch.equal(read(net.second), followed)
        assert torch.isfinite(read(net.first)).all()
    assert_as_before(net, before)


def test_nothing_is_followed_in_training():
    """The norms do then what they do in a training; the scope puts it back."""
    bn, other = make_bn(), make_bn()
    before = snapshot(bn)
    with following_stream(bn) as following:
        bn.train()
        other.train()
        bn(batches()[0])
        other(batches()[0])
        assert torch.equal(read(bn), read(other))
        assert following.num_batches == 0
    assert_as_before(bn, before)


@pytest.mark.parametrize("row", [1, 4])
def test_levels_that_share_a_population_are_one_batch(row):
    norm = make_norm(NormSpec.from_table5_row(row)).eval()
    before, features = snapshot(norm), make_features()
    source = {level: read(norm.population_state(level)) for level in LEVELS}
    with following_stream(norm, momentum=0.2):
        norm(features)
        for level in LEVELS:
            seen = list(features.values()) if norm.spec.population == "shared" else [features[level]]
            expected = 0.8 * source[level] + 0.2 * measure(seen)
            torch.testing.assert_close(read(norm.population_state(level)), expected, **EXACT)
    assert_as_before(norm, before)


def test_a_batch_of_two_domains():
    norm = randomize(BatchNorm2d(NUM_CHANNELS, OWN).double()).eval()
    batch, before = batches()[2], snapshot(norm)
    source = {name: read(norm.population_state(name)) for name in OWN.domains}
    names = ["night", "day", "night", "night", "day"]
    with following_stream(norm, momentum=None, source_samples=3):
        with use_domain(names):
            norm(batch)
        for name in OWN.domains:
            own = batch[[other == name for other in names]]
            expected = (3 * source[name] + len(own) * measure([own])) / (3 + len(own))
            torch.testing.assert_close(read(norm.population_state(name)), expected, **EXACT)
        night = read(norm.night)
        with use_domain("day"):
            norm(batch)
        assert torch.equal(read(norm.night), night)
    assert_as_before(norm, before)


def test_one_element_and_no_image_are_not_followed():
    bn = make_bn()
    source = read(bn)
    with following_stream(bn, momentum=None):
        bn(torch.ones(1, NUM_CHANNELS, 1, 1).double())
        bn(torch.ones(0, NUM_CHANNELS, 3, 3).double())
        assert torch.equal(read(bn), source)


def test_selected_layers_only():
    net = make_net().eval()
    first = read(net.first)
    with following_stream(net, layers=lambda path, module: path == "second"):
        net(batches()[0])
        assert torch.equal(read(net.first), first)
    with pytest.raises(StatisticsError, match="must have a batch norm"), following_stream(nn.Conv2d(3, 3, 1)):
        pass


def test_a_reused_norm_follows_every_call():
    bn, (first, second, *_) = make_bn(), batches()
    expected = 0.9 * (0.9 * read(bn) + 0.1 * measure([first])) + 0.1 * measure([second])
    with following_stream(bn) as following:
        bn(first), bn(second)
        torch.testing.assert_close(read(bn), expected, **EXACT)
        assert following.num_batches == 2


def follow_own_stream(rank):
    spec = NormSpec(statistics="shared", population="shared", workers="all")
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, ["p3"], spec).double()).eval()
    before = read(norm)
    with following_stream(norm):
        for batch in batches()[rank : 2 + 2 * rank]:  # 2 and 3 batches
            norm({"p3": batch})
        followed = read(norm)
    return followed, torch.equal(read(norm), before), before


def test_every_worker_follows_its_own_stream():
    for rank, (followed, is_restored, expected) in enumerate(run_workers(follow_own_stream, 2)):
        for batch in batches()[rank : 2 + 2 * rank]:
            expected = 0.9 * expected + 0.1 * measure([batch])
        torch.testing.assert_close(followed, expected, **EXACT)
        assert is_restored


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("momentum", {"momentum": value}) for value in (0, 1.5, float("nan"), "0.1", True)),
        ("source_samples", {"source_samples": 3}),
        *(("source_samples", {"momentum": None, "source_samples": v}) for v in (-1, float("nan"), float("inf"), "5")),
    ],
)
def test_arguments_out_of_range_are_refused(name, arguments):
    bn = make_bn()
    before = snapshot(bn)
    with pytest.raises(StatisticsError, match=f"^{name} must .*following_stream"), following_stream(bn, **arguments):
        pass
    assert_as_before(bn, before)


class Partly(nn.Module):
    """Called by its forward, or past it, as detectron2's `model.inference`."""

    def __init__(self):
        super().__init__()
        self.bn = make_bn()

    def forward(self, x):
        return self.inference(x)

    def inference(self, x):
        return self.bn(x)


def test_samples_count_whether_the_forward_is_called_or_a_part_of_it():
    whole, part, data = Partly(), Partly(), batches()
    with (
        following_stream(whole, momentum=None, source_samples=20),
        following_stream(part, momentum=None, source_samples=20),
    ):
        for batch in data:
            whole(batch)
            part.inference(batch)
        torch.testing.assert_close(read(part.bn), read(whole.bn), **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_part_is_taken_in_once(use_reentrant):
    plain, other = Partly().eval(), Partly().eval()
    x = batches(1)[0].requires_grad_()
    with following_stream(plain), following_stream(other):
        plain(x).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(other, x, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(read(other.bn), read(plain.bn), **EXACT)
    torch.testing.assert_close(x.grad, expected, **EXACT)


def test_what_the_caller_sets_on_the_model_meanwhile_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with following_stream(model):
        model.threshold = 0.3
        model.register_buffer("gallery", torch.ones(5))
        model(torch.randn(2, 3, 4, 4))
        model.train()
    assert (model.threshold, len(model.gallery), model.training) == (0.3, 5, False)
    assert not model[1].running_mean.any()

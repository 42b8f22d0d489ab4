"""Faults of the peers that re-estimate population statistics, shown on the peer as installed, and then not on ours.

The peers are fvcore's `update_bn_stats` (detectron2's PreciseBN) and torch's `update_bn` (`torch.optim.swa_utils`).
Where a peer mends its fault, its half of the test fails: then the fault is history, and the test's first half goes.
"""

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.layers import CycleBatchNormList
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from bnext import recompute_population_statistics
from bnext.heads import forward_statistics
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, make_features
from tests.heads.detectors import make_batch, make_detector
from tests.workers import run_workers


def make_batches(number=4):
    return [make_features(seed)["p3"] for seed in range(number)]


# fvcore: update_bn_stats


class Reusing(nn.Module):
    """A plain BN in a level-shared head: row 3."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(NUM_CHANNELS).double()

    def forward(self, features):
        return [self.bn(feature) for feature in features.values()]


class Skipping(nn.Module):
    """One norm is not part of this forward."""

    def __init__(self):
        super().__init__()
        self.used = nn.BatchNorm2d(NUM_CHANNELS).double()
        self.unused = nn.BatchNorm2d(NUM_CHANNELS).double()

    def forward(self, x):
        return self.used(x)


class Calling(nn.Module):
    """A model whose forward is given."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, batch):
        return self.call(self.model, batch)


class OwnNorm(_BatchNorm):
    """A batch norm that is none of the four classes which fvcore knows."""

    def _check_input_dim(self, input):
        pass


def test_re_estimation_of_a_reused_layer():
    data = [make_features(seed) for seed in range(3)]
    with pytest.raises(AssertionError, match="Some BN layers are reused"):
        update_bn_stats(Reusing(), data, num_iters=3)
    ours = Reusing()
    recompute_population_statistics(ours, data)
    _, mean, _ = reference.moments_of([x for features in data for x in features.values()])
    torch.testing.assert_close(ours.bn.running_mean, mean)


def test_re_estimation_of_a_layer_that_is_not_reached():
    peer, ours = Skipping(), Skipping()
    update_bn_stats(peer, make_batches(), num_iters=4)
    assert torch.equal(peer.unused.running_var, torch.zeros(NUM_CHANNELS).double())
    report = recompute_population_statistics(ours, make_batches())
    assert torch.equal(ours.unused.running_var, torch.ones(NUM_CHANNELS).double())
    assert [estimate.path for estimate in report.not_reached] == ["unused"]
    torch.testing.assert_close(ours.used.running_var, peer.used.running_var, rtol=0.05, atol=0)


def test_re_estimation_with_a_short_loader():
    peer, ours = Skipping(), Skipping()
    with pytest.raises(AssertionError, match="dataloader stops at"):
        update_bn_stats(peer, make_batches(), num_iters=9)
    assert peer.used.momentum == 1.0
    assert len(peer.used._forward_pre_hooks) == 1
    assert recompute_population_statistics(ours, make_batches(), num_batches=9).num_batches == 4
    assert ours.used.momentum == 0.1
    assert not ours.used._forward_pre_hooks


def test_re_estimation_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 32, 32, 32, generator=generator) + 1e4 for _ in range(8)]
    peer, ours = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
    update_bn_stats(peer, data, num_iters=8)
    assert peer.running_var.min() < 0
    recompute_population_statistics(ours, data)
    count, _, var = reference.moments_of(data)
    torch.testing.assert_close(ours.running_var.double(), var * count / (count - 1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_re_estimation_that_is_broken_off(error):
    """The peer's momentum, hooks and statistics stay as they are then."""
    peer, ours = Skipping(), Skipping()
    before = {key: value.clone() for key, value in ours.state_dict().items()}

    def load():
        yield from make_batches()
        raise error

    with pytest.raises(type(error)):
        update_bn_stats(peer, load(), num_iters=9)
    with pytest.raises(type(error)):
        recompute_population_statistics(ours, load())
    assert (peer.used.momentum, len(peer.used._forward_pre_hooks)) == (1.0, 1)
    assert not torch.equal(peer.used.running_var, before["used.running_var"])
    with pytest.raises(AssertionError, match="Some BN layers are reused"):
        peer(make_batches()[0])  # by the hook of the run before: it can no longer be trained
    assert (ours.used.momentum, len(ours.used._forward_pre_hooks)) == (0.1, 0)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_re_estimation_that_is_broken_off_within_the_cycling_head():
    def forward(model, features):
        for level, feature in features.items():
            if level == "p5":
                raise RuntimeError("out of memory")
            model(feature)

    peer, ours = (
        CycleBatchNormList(len(LEVELS), bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS).double() for _ in range(2)
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        update_bn_stats(Calling(peer, forward), [make_features()], num_iters=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        recompute_population_statistics(ours, [make_features()], forward=forward)
    assert (peer._pos, ours._pos) == (2, 0)


def test_layer_by_layer_ends_a_forward_early_and_the_cycling_head_stays_aligned():
    """A forward is broken off at the norm in question; the head counts its calls to know its level."""
    ours, data = (
        CycleBatchNormList(len(LEVELS), bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS).double(),
        [make_features(seed) for seed in range(2)],
    )

    def forward(model, features):
        for feature in features.values():
            model(feature)

    recompute_population_statistics(ours, data, forward=forward, estimator="layer_by_layer")
    for index, level in enumerate(LEVELS):
        _, mean, _ = reference.moments_of([features[level] for features in data])
        torch.testing.assert_close(ours[index].running_mean, mean)
    assert ours._pos == 0


def test_re_estimation_of_an_own_norm_class():
    peer, ours = (nn.Sequential(OwnNorm(NUM_CHANNELS).double()) for _ in range(2))
    update_bn_stats(peer, make_batches(), num_iters=4)
    assert torch.equal(peer[0].running_mean, torch.zeros(NUM_CHANNELS).double()), "skipped without a word"
    recompute_population_statistics(ours, make_batches())
    _, mean, _ = reference.moments_of(make_batches())
    torch.testing.assert_close(ours[0].running_mean, mean)


# torch: update_bn


def test_re_estimation_of_a_detector_by_torch():
    """facebookresearch/SlowFast#282, pytorch/pytorch#49082: of a list of records the model gets the first one."""
    model, batch = make_detector(row=3), make_batch()
    with pytest.raises((TypeError, KeyError, ValueError, RuntimeError)):
        update_bn([batch], model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = recompute_population_statistics(model, [batch], forward=forward_statistics)
    assert not report.not_reached
    assert not torch.equal(model.head.cls_subnet[1].running_mean, before["head.cls_subnet.1.running_mean"])


def test_re_estimation_by_torch_that_is_broken_off():
    """Statistics are reset, moving averages have become cumulative, and the model is in training mode."""
    peer, ours = Skipping().eval(), Skipping().eval()
    for model in (peer, ours):
        model.used.running_mean.fill_(3.0)
    before = {key: value.clone() for key, value in ours.state_dict().items()}

    def load():
        yield make_batches()[0]
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        update_bn(load(), peer)
    assert (peer.used.momentum, peer.training) == (None, True)
    assert not torch.equal(peer.used.running_mean, before["used.running_mean"])
    with pytest.raises(RuntimeError, match="lost"):
        recompute_population_statistics(ours, load())
    assert (ours.used.momentum, ours.training) == (0.1, False)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_re_estimation_by_torch_of_a_layer_that_is_not_reached():
    peer, ours = Skipping(), Skipping()
    for model in (peer, ours):
        model.unused.running_mean.fill_(3.0)
    update_bn(make_batches(), peer)
    recompute_population_statistics(ours, make_batches())
    assert torch.equal(peer.unused.running_mean, torch.zeros(NUM_CHANNELS).double()), "what was there is lost"
    assert torch.equal(ours.unused.running_mean, torch.full((NUM_CHANNELS,), 3.0).double())


def test_the_variance_of_torch_leaves_out_what_differs_between_batches():
    data = [batch + 5 * number for number, batch in enumerate(make_batches())]
    peer, ours = (nn.BatchNorm2d(NUM_CHANNELS).double() for _ in range(2))
    update_bn(data, peer)
    recompute_population_statistics(ours, data)
    count, _, var = reference.moments_of(data)
    torch.testing.assert_close(ours.running_var, var * count / (count - 1))
    assert (peer.running_var < 0.5 * ours.running_var).all()


def test_dropout_takes_part_in_the_estimate_of_torch():
    torch.manual_seed(0)
    peer, ours = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(NUM_CHANNELS)).double() for _ in range(2))
    data = [batch + 3 for batch in make_batches()]
    update_bn(data, peer)
    recompute_population_statistics(ours, data)
    _, mean, var = reference.moments_of(data)
    assert (peer[1].running_var > 1.3 * var).all()
    torch.testing.assert_close(ours[1].running_mean, mean)


# Several workers


def estimate_a_share(rank):
    peer, ours = (nn.BatchNorm2d(NUM_CHANNELS).double() for _ in range(2))
    update_bn_stats(peer, [make_share(rank)], num_iters=1)
    recompute_population_statistics(ours, [make_share(rank)])
    return peer.running_mean, ours.running_mean


def make_share(rank):
    """Images of one worker are larger and brighter than those of the other."""
    return make_features(rank)["p3"] if rank == 0 else make_features(rank, ((2, 2, 3), (1, 1, 1), (1, 1, 1)))["p3"] + 3


def test_re_estimation_by_fvcore_differs_between_workers():
    """facebookresearch/fvcore#152, facebookresearch/detectron2#5398 and #5409."""
    (first, ours), (second, other) = run_workers(estimate_a_share, 2)
    assert not torch.allclose(first, second)
    assert torch.equal(ours, other)
    _, mean, _ = reference.moments_of([make_share(0), make_share(1)])
    torch.testing.assert_close(ours, mean)

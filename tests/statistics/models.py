"""A small model with several norms, its data, and what is compared before and after."""

import torch
from torch import nn

from tests import reference
from tests.cases import NUM_CHANNELS, make_features, randomize

STATE = ("running_mean", "running_var")


def assert_population(state, features):
    count, mean, var = reference.moments_of(features)
    torch.testing.assert_close(state.running_mean.double(), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.running_var.double(), var * count / (count - 1), rtol=1e-12, atol=1e-12)


def snapshot(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()},
        {name: getattr(module, "momentum", None) for name, module in model.named_modules()},
        {name: buffer.data_ptr() for name, buffer in model.named_buffers()},
    )


def assert_as_before(model, before):
    after = snapshot(model)
    assert after[0].keys() == before[0].keys()
    changed = [k for k, value in before[0].items() if not torch.equal(value, after[0][k])]
    assert not changed
    assert after[1:] == before[1:]


class Net(nn.Module):
    """Two norms, one of them reached only with `long`; a dropout and a frozen norm beside them."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(NUM_CHANNELS)
        self.drop = nn.Dropout(0.9)
        self.frozen = nn.BatchNorm2d(NUM_CHANNELS, track_running_stats=False)
        self.second = nn.BatchNorm2d(NUM_CHANNELS)
        self.long = True

    def forward(self, batch):
        if isinstance(batch, BaseException):
            raise batch
        x = self.drop(self.first(batch))
        return self.second(x) if self.long else x


def make_net(training=False):
    net = randomize(Net().double()).train(training)
    net.first.eval()  # a mixture of modes is somebody's choice too
    net.second.momentum = 0.37
    return net


def batches(number=4, samples=3):
    """Batches of unequal size and of unequal mean."""
    return [make_features(seed, ((samples + seed, 4, 3), (1, 1, 1), (1, 1, 1)))["p3"] + seed for seed in range(number)]

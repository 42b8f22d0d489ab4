"""What an estimate must not depend on: former statistics, the order of batches, how a norm is called."""

import pytest
import torch
from torch import nn

from bnext import StatisticsError, following_stream, recompute_population_statistics
from bnext.layers import BatchNorm2d, NormSpec
from tests.workers import run_workers


def make_net(spec):
    torch.manual_seed(0)
    net = nn.Sequential(BatchNorm2d(2, spec), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double().eval()
    return net


@pytest.mark.parametrize("training", ["renorm", "population"])
def test_an_estimate_does_not_depend_on_former_statistics_or_on_the_order_of_batches(training):
    data = [torch.randn(4, 2, 3, 3, dtype=torch.float64) + k for k in range(6)]
    found = []
    for mean, batches in ((0.0, data), (5.0, data), (0.0, data[::-1])):
        net = make_net(NormSpec(training=training))
        net[0].running_mean.fill_(mean)
        recompute_population_statistics(net, batches)
        assert net[0].spec.training == training
        found.append(net[3].running_mean)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)


class Sometimes(nn.Module):
    """a, then sometimes b, then c."""

    def __init__(self):
        super().__init__()
        self.c, self.b, self.a = (nn.BatchNorm2d(2, eps=1e-3).double() for _ in range(3))

    def forward(self, x):
        x = self.a(x) * 3 + 1
        if x.shape[0] == 4:
            x = self.b(x).relu()
        return self.c(x)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_layer_by_layer_finds_the_order_from_all_batches(is_reversed):
    data = [torch.randn(3, 2, 3, 3, dtype=torch.float64) + 2, torch.randn(4, 2, 3, 3, dtype=torch.float64)]
    torch.manual_seed(0)
    net = Sometimes().eval()
    recompute_population_statistics(net, data[:: -1 if is_reversed else 1], estimator="layer_by_layer")
    seen = []
    net.c.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            net(batch)
    expected = torch.cat([x.movedim(1, -1).flatten(0, 2) for x in seen]).mean(0)
    torch.testing.assert_close(net.c.running_mean, expected)


def test_layer_by_layer_gives_later_norms_what_the_blended_statistics_of_earlier_ones_make():
    torch.manual_seed(1)
    net = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).double().eval()
    data = [torch.randn(4, 2, 3, 3, dtype=torch.float64) + 3 for _ in range(2)]
    recompute_population_statistics(net, data, estimator="layer_by_layer", source_samples=8)
    with torch.no_grad():
        hidden = torch.cat([net[1](net[0](x)) for x in data])
    torch.testing.assert_close(net[2].running_mean, hidden.mean((0, 2, 3)) / 2)  # 8 images and a source mean of 0


def test_batches_of_a_single_element_have_no_variance_to_average():
    norm = BatchNorm2d(2, NormSpec(single_element="population")).double().eval()
    torch.manual_seed(0)
    data = [torch.randn(n, 2, 1, 1, dtype=torch.float64) * 2 for n in (9, 1) * 40]
    recompute_population_statistics(norm, data, estimator="mean_of_batches")
    expected = torch.stack([x.var((0, 2, 3)) for x in data if len(x) > 1]).mean(0)
    torch.testing.assert_close(norm.running_var, expected)


def test_a_short_last_batch_names_layer_and_batch():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    before = net[1].running_mean.clone()
    with pytest.raises(StatisticsError, match=r"more than 1 element per channel; got 1 \(1, batch 2\).*drop_last=True"):
        recompute_population_statistics(net, [torch.randn(8, 3), torch.randn(1, 3)])
    assert torch.equal(net[1].running_mean, before)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(input=x)


def test_a_norm_may_be_called_by_name():
    net, image = ByName().eval(), torch.randn(4, 2, 3, 3) + 4
    recompute_population_statistics(net, [image])
    torch.testing.assert_close(net.norm.running_mean, image.mean((0, 2, 3)))
    with following_stream(net, momentum=1.0):
        net(image * 2)
        torch.testing.assert_close(net.norm.running_mean, 2 * image.mean((0, 2, 3)))


class Shared(nn.Module):
    """A norm of torch that sees three features of every image."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2).double()

    def forward(self, x):
        return [self.norm(x) for _ in range(3)]


def test_a_stream_counts_images_once_however_often_a_norm_is_called():
    net, image = Shared().eval(), torch.randn(10, 2, 3, 3, dtype=torch.float64) + 4
    with following_stream(net, momentum=None, source_samples=10) as following, torch.no_grad():
        net(image)
        torch.testing.assert_close(net.norm.running_mean, image.mean((0, 2, 3)) / 2)
        assert following.num_batches == 1


def test_a_compiled_model_cannot_follow():
    with pytest.raises(StatisticsError, match="model must not be compiled"), following_stream(torch.compile(ByName())):
        pass


class Foreign(nn.BatchNorm2d):
    """Might talk to other workers in its forward."""


def run_uneven(rank, kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 2, 1), kind(2)).double().eval()
    report = recompute_population_statistics(net, [torch.randn(2, 2, 3, 3, dtype=torch.float64)] * (5 - 2 * rank))
    return report.num_batches


def test_a_batch_norm_that_is_not_known_ends_with_the_shortest_data():
    assert run_workers(run_uneven, 2, Foreign) == [6, 6]
    assert run_workers(run_uneven, 2, nn.BatchNorm2d) == [8, 8]


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
def test_statistics_that_are_not_finite_are_replaced_or_refused(estimator):
    data = [torch.randn(4, 2, 3, 3) for _ in range(2)]
    norm = nn.BatchNorm2d(2).eval()
    norm.running_var.fill_(float("nan"))
    with pytest.raises(StatisticsError, match="must be finite, as they count for 8 images"):
        recompute_population_statistics(norm, data, estimator=estimator, source_samples=8)
    recompute_population_statistics(norm, data, estimator=estimator)
    assert torch.isfinite(norm.running_var).all()


def test_statistics_that_overflow_half_buffers_are_refused():
    norm = nn.BatchNorm2d(2).half().eval()
    with pytest.raises(StatisticsError, match=r"in the type of their buffers; got an overflow in torch\.float16"):
        recompute_population_statistics(norm, [torch.randn(4, 2, 3, 3).half() * 1500])
    assert norm.running_var.tolist() == [1, 1]


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
def test_what_a_batch_draws_is_the_same_in_every_pass_and_after_other_draws(estimator):
    data = [torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(3)]
    drawn = []

    def forward(model, batch):
        drawn.append(torch.rand(1).item())
        model(batch + drawn[-1])

    for number_before in (0, 5):
        torch.rand(number_before)
        recompute_population_statistics(make_net(NormSpec()), data, forward=forward, estimator=estimator, seed=3)
    assert drawn == drawn[:3] * (len(drawn) // 3)
    assert len(set(drawn)) == 3

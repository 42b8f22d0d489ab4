"""Re-estimated population statistics are the moments of all data; nothing else of the model changes, come what may."""

import pytest
import torch
from torch import nn

from bnext import recompute_population_statistics
from bnext.errors import StatisticsError
from bnext.layers import LevelBatchNorm2d, NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm, randomize

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STATE = ("running_mean", "running_var")


def assert_population(state, features):
    count, mean, var = reference.moments_of(features)
    torch.testing.assert_close(state.running_mean.double(), mean, **EXACT)
    torch.testing.assert_close(state.running_var.double(), var * count / (count - 1), **EXACT)


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


@pytest.mark.parametrize("row", ROWS)
def test_every_row_gets_the_moments_of_all_data_concatenated(row):
    norm = make_norm(NormSpec.from_table5_row(row)).eval()
    before = snapshot(norm)
    data = [make_features(seed, ((2 + seed, 6, 5), (2, 3 + seed, 3), (2, 2, 1))) for seed in range(4)]
    report = recompute_population_statistics(norm, data)
    for level in LEVELS:
        seen = [level] if norm.spec.population == "per_level" else LEVELS
        assert_population(norm.population_state(level), [batch[name] for batch in data for name in seen])
    assert snapshot(norm)[1:] == before[1:]
    assert [estimate.levels for estimate in report.estimates] == (
        [LEVELS] if norm.spec.population == "shared" else [(level,) for level in LEVELS]
    )
    counts = [sum(batch[name][:, 0].numel() for batch in data for name in e.levels) for e in report.estimates]
    assert [estimate.count for estimate in report.estimates] == counts
    assert not report.not_reached
    assert report.num_batches == 4


@pytest.mark.parametrize("training", [True, False])
def test_later_norms_see_mini_batch_normalized_features_as_in_training(training):
    net, data = make_net(training), batches()
    before = snapshot(net)
    recompute_population_statistics(net, data)
    assert_population(net.first, data)
    weights, biases = [net.first.weight.detach()], [net.first.bias.detach()]
    normalized = [reference.concatenated_batch_norm([x], weights, biases, net.first.eps)[0] for x in data]
    assert_population(net.second, normalized)  # without the dropout, which is in evaluation mode
    after = snapshot(net)
    assert after[1:] == before[1:]
    kept = [key for key in before[0] if not key.endswith((*STATE, "num_batches_tracked"))]
    assert all(torch.equal(after[0][key], before[0][key]) for key in kept)


def test_float32_model_on_data_far_from_zero():
    bn = nn.BatchNorm2d(NUM_CHANNELS)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, NUM_CHANNELS, 32, 32, generator=generator) + 1e4 for _ in range(5)]
    recompute_population_statistics(bn, data)
    count, _, var = reference.moments_of(data)
    assert ((bn.running_var.double() - var * count / (count - 1)) / var).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (6, NUM_CHANNELS)),
        (nn.BatchNorm1d, (6, NUM_CHANNELS, 3)),
        (nn.BatchNorm3d, (2, NUM_CHANNELS, 2, 3, 2)),
        (nn.SyncBatchNorm, (3, NUM_CHANNELS, 4, 4)),
        (type("Mine", (nn.BatchNorm2d,), {}), (3, NUM_CHANNELS, 4, 4)),
    ],
)
def test_every_kind_of_batch_norm(kind, shape):
    bn = kind(NUM_CHANNELS).double()
    data = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).double() * 2 + i for i in range(3)]
    recompute_population_statistics(bn, data)
    _, mean, _ = reference.moments_of(data)
    torch.testing.assert_close(bn.running_mean, mean, **EXACT)
    rows = reference.per_channel_rows(data)
    torch.testing.assert_close(bn.running_var, rows.var(1), **EXACT)


def test_a_layer_called_several_times_sees_all_its_calls():
    bn = nn.BatchNorm2d(NUM_CHANNELS).double()
    model = nn.ModuleList([bn])
    data = batches()
    recompute_population_statistics(model, data, forward=lambda m, x: (m[0](x), m[0](x * 3 + 1)))
    assert_population(bn, [*data, *(x * 3 + 1 for x in data)])


def test_a_layer_that_is_not_reached_keeps_its_values_and_is_reported():
    net = make_net()
    net.long = False
    before = snapshot(net)[0]
    report = recompute_population_statistics(net, batches())
    assert [estimate.path for estimate in report.not_reached] == ["second"]
    assert "not reached, left as it was: second" in str(report)
    after = net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("second"))
    assert not torch.equal(after["first.running_mean"], before["first.running_mean"])


def test_a_level_that_is_not_reached_keeps_its_values_and_is_reported():
    norm = make_norm(NormSpec.from_table5_row(4))
    before = norm.p4.running_var.clone()
    data = [{level: x for level, x in make_features(seed).items() if level != "p4"} for seed in range(2)]
    report = recompute_population_statistics(norm, data)
    assert [estimate.levels for estimate in report.not_reached] == [("p4",)]
    assert torch.equal(norm.p4.running_var, before)


def test_one_element_is_no_estimate():
    norm = make_norm(NormSpec.from_table5_row(2))
    before = norm.p5.running_var.clone()
    report = recompute_population_statistics(
        norm, [{**make_features(), "p5": torch.ones(1, NUM_CHANNELS, 1, 1).double()}]
    )
    assert [estimate.levels for estimate in report.not_reached] == [("p5",)]
    assert torch.equal(norm.p5.running_var, before)


def test_empty_batches_have_no_influence():
    bn, data = nn.BatchNorm2d(NUM_CHANNELS).double(), batches()
    empty = torch.empty(0, NUM_CHANNELS, 4, 4).double()
    recompute_population_statistics(bn, [empty, *data, empty])
    assert_population(bn, data)


def test_frozen_norms_are_left_alone():
    frozen = pytest.importorskip("detectron2.layers").FrozenBatchNorm2d(NUM_CHANNELS).double()
    model = nn.Sequential(randomize(frozen), nn.BatchNorm2d(NUM_CHANNELS).double())
    before = snapshot(model[0])
    report = recompute_population_statistics(model, batches())
    assert_as_before(model[0], before)
    assert [estimate.path for estimate in report.estimates] == ["1"]


def test_selected_layers_only():
    net = make_net()
    before = snapshot(net)[0]
    seen = []
    report = recompute_population_statistics(
        net, batches(), layers=lambda path, module: seen.append((path, module)) or path == "second"
    )
    assert seen == [("first", net.first), ("second", net.second)]
    assert [estimate.path for estimate in report.estimates] == ["second"]
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before if key.startswith("first"))
    # The other norm is in evaluation mode: the second sees what it sees at inference.
    inputs = [
        reference.inference_norm(
            x, net.first.running_mean, net.first.running_var, net.first.weight, net.first.bias, 1e-5
        ).detach()
        for x in batches()
    ]
    assert_population(net.second, inputs)


def test_num_batches_limits_and_a_short_loader_is_enough():
    net, data = make_net(), batches()
    assert recompute_population_statistics(net, iter(data), num_batches=2).num_batches == 2
    assert_population(net.first, data[:2])
    assert recompute_population_statistics(net, iter(data), num_batches=100).num_batches == 4
    assert_population(net.first, data)
    assert net.second.momentum == 0.37


@pytest.mark.parametrize(
    ("poison", "error"),
    [
        (RuntimeError("lost"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (torch.full((2, NUM_CHANNELS, 3, 3), float("nan")).double(), StatisticsError),
        (torch.full((2, NUM_CHANNELS, 3, 3), float("inf")).double(), StatisticsError),
        (torch.zeros(2, NUM_CHANNELS + 1, 3, 3).double(), Exception),
    ],
    ids=["exception", "interrupt", "nan", "inf", "shape"],
)
@pytest.mark.parametrize("training", [True, False])
def test_after_an_error_the_model_is_bitwise_as_it_was(poison, error, training):
    net = make_net(training)
    before = snapshot(net)
    with pytest.raises(error):
        recompute_population_statistics(net, [*batches(), poison])
    assert_as_before(net, before)


def test_a_loader_that_fails_leaves_the_model_bitwise_as_it_was():
    def load():
        yield from batches()
        raise OSError("disk")

    net = make_net(training=True)
    before = snapshot(net)
    with pytest.raises(OSError, match="disk"):
        recompute_population_statistics(net, load())
    assert_as_before(net, before)


@pytest.mark.parametrize("row", ROWS)
def test_level_norms_are_as_they_were_after_an_error(row):
    norm = make_norm(NormSpec.from_table5_row(row)).train()
    before = snapshot(norm)
    bad = {**make_features(), "p4": torch.full((1, NUM_CHANNELS, 2, 2), float("nan")).double()}
    with pytest.raises(StatisticsError, match=r"finite; got NaN or Inf"):
        recompute_population_statistics(norm, [make_features(), bad])
    assert_as_before(norm, before)


def test_an_empty_loader_is_an_error_and_changes_nothing():
    net = make_net()
    before = snapshot(net)
    with pytest.raises(StatisticsError, match="at least one batch.*got 0 batches"):
        recompute_population_statistics(net, [])
    assert_as_before(net, before)


def test_a_model_without_a_norm_is_an_error():
    for model in (nn.Conv2d(3, 3, 1), nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False))):
        with pytest.raises(StatisticsError, match="must have a batch norm with running statistics"):
            recompute_population_statistics(model, [torch.zeros(2, 3, 2, 2)])


def test_the_report_tells_how_far_statistics_moved():
    bn = nn.BatchNorm2d(1).double()
    with torch.no_grad():
        bn.running_mean.fill_(5.0)
        bn.running_var.fill_(4.0)
    data = torch.tensor([-1.0, 1.0] * 200).reshape(1, 1, 20, 20).double()
    (estimate,) = recompute_population_statistics(bn, [data]).estimates
    assert estimate.mean_shift == pytest.approx(5.0, rel=1e-2)
    assert estimate.var_ratio == pytest.approx(4.0, rel=1e-2)
    again = recompute_population_statistics(bn, [data])
    assert again.estimates[0].mean_shift == pytest.approx(0.0, abs=1e-12)
    assert again.estimates[0].var_ratio == pytest.approx(1.0)
    assert "1 sets from 1 batches" in str(again)


def test_gradients_are_neither_recorded_nor_touched():
    net = make_net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen = []
    recompute_population_statistics(net, batches(), forward=lambda m, x: seen.append(m(x).requires_grad))
    assert not any(seen)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in net.parameters())


def test_levels_of_one_norm_and_a_plain_norm_in_one_model():
    model = nn.ModuleDict(
        {"bn": nn.BatchNorm2d(NUM_CHANNELS), "level": LevelBatchNorm2d(NUM_CHANNELS, LEVELS)}
    ).double()
    data = [make_features(seed) for seed in range(3)]

    def forward(model, features):
        return model["level"]({level: model["bn"](x) for level, x in features.items()})

    report = recompute_population_statistics(model, data, forward=forward)
    assert_population(model["bn"], [x for features in data for x in features.values()])
    assert [(e.path, e.levels) for e in report.estimates] == [("bn", ()), *(("level", (level,)) for level in LEVELS)]

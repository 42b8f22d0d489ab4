"""Re-estimated population statistics are the moments of all data; nothing else of the model changes."""

import pytest
import torch
from torch import nn

from bnext import recompute_population_statistics, use_domain
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm, make_pairs, randomize
from tests.statistics.models import STATE, assert_as_before, assert_population, batches, make_net, snapshot

EXACT = {"rtol": 1e-12, "atol": 1e-12}


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
        {
            "bn": nn.BatchNorm2d(NUM_CHANNELS),
            "level": LevelBatchNorm2d(NUM_CHANNELS, LEVELS, NormSpec.from_table5_row(4)),
        }
    ).double()
    data = [make_features(seed) for seed in range(3)]

    def forward(model, features):
        return model["level"]({level: model["bn"](x) for level, x in features.items()})

    report = recompute_population_statistics(model, data, forward=forward)
    assert_population(model["bn"], [x for features in data for x in features.values()])
    assert [(e.path, e.levels) for e in report.estimates] == [("bn", ()), *(("level", (level,)) for level in LEVELS)]


@pytest.mark.parametrize("sharing", ["shared", "per_domain"])
def test_every_domain_of_mixed_and_pure_batches_is_estimated_by_its_samples(sharing):
    spec = NormSpec(statistics="per_domain", population=sharing, domains=("day", "night"))
    norm = randomize(BatchNorm2d(NUM_CHANNELS, spec).double())
    data = [torch.randn(3, NUM_CHANNELS, 4, 5).double() * (i + 1) + i for i in range(3)]
    domains = ["day", ("night", "day", "night"), "night"]

    def forward(model, batch):
        with use_domain(batch[0]):
            model(batch[1])

    pairs = list(zip(domains, data, strict=True))
    report = recompute_population_statistics(nn.Sequential(norm), pairs, forward=forward)
    day, night = [data[0], data[1][1:2]], [data[1][0:1], data[1][2:], data[2]]
    if sharing == "shared":
        assert_population(norm, [*day, *night])
    else:
        assert_population(norm.day, day)
        assert_population(norm.night, night)
    assert {estimate.levels for estimate in report.estimates} == (
        {("day", "night")} if sharing == "shared" else {("day",), ("night",)}
    )


@pytest.mark.parametrize("population", ["per_domain", "per_level_and_domain"])
def test_every_domain_at_every_level_is_estimated_by_its_samples(population):
    norm = make_pairs("per_domain", population, "shared").build()
    data = [make_features(seed) for seed in range(3)]
    names = ["day", ("night", "day"), "night"]

    def forward(model, batch):
        with use_domain(batch[0]):
            model(batch[1])

    report = recompute_population_statistics(norm, list(zip(names, data, strict=True)), forward=forward)
    for level in LEVELS:
        levels = LEVELS if population == "per_domain" else (level,)
        day = [x for name in levels for x in (data[0][name], data[1][name][1:])]
        night = [x for name in levels for x in (data[1][name][:1], data[2][name])]
        assert_population(norm.population_state(f"day_{level}"), day)
        assert_population(norm.population_state(f"night_{level}"), night)
    assert all("fog" in estimate.levels[0] for estimate in report.not_reached)
    assert len(report.not_reached) == (1 if population == "per_domain" else len(LEVELS))


def test_frozen_statistics_are_not_estimated():
    model = nn.Sequential(BatchNorm2d(NUM_CHANNELS, NormSpec(frozen="statistics")), nn.BatchNorm2d(NUM_CHANNELS))
    report = recompute_population_statistics(model, [torch.randn(4, NUM_CHANNELS, 3, 3)])
    assert [estimate.path for estimate in report.estimates] == ["1"]
    assert int(model[0].num_batches_tracked) == 0

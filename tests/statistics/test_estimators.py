"""Each estimator against its definition in float64."""

import copy

import pytest
import torch
from torch import nn

from bnext import StatisticsError, recompute_population_statistics
from bnext.layers import NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm, randomize
from tests.statistics.models import assert_as_before, assert_population, batches, make_net, snapshot

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Deep(nn.Module):
    """Three norms and a convolution; the last norm is called twice, the first one's name comes last."""

    def __init__(self):
        super().__init__()
        self.twice = nn.BatchNorm2d(NUM_CHANNELS)
        self.conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1)
        self.middle = nn.BatchNorm2d(NUM_CHANNELS)
        self.unused = nn.BatchNorm2d(NUM_CHANNELS)
        self.begin = nn.BatchNorm2d(NUM_CHANNELS)
        self.counts = dict.fromkeys(("begin", "middle", "twice"), 0)

    def forward(self, x):
        self.counts["begin"] += 1
        x = self.conv(self.begin(x)).relu()
        self.counts["middle"] += 1
        x = self.middle(x)
        self.counts["twice"] += 1
        return self.twice(x), self.twice(2 * x + 1)


def make_deep(seed=1):
    return randomize(Deep().double(), seed).eval()


def normalize(norm, x):
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, 1e-5)


def split(data, size):
    return list(torch.cat([batch[..., :2, :2] for batch in data]).split(size))


def test_mean_of_batches_is_the_mean_of_what_torch_remembers_of_each():
    bn, data = nn.BatchNorm2d(NUM_CHANNELS).double(), batches()
    recompute_population_statistics(bn, data, estimator="mean_of_batches")
    torch.testing.assert_close(bn.running_mean, torch.stack([x.mean([0, 2, 3]) for x in data]).mean(0), **EXACT)
    expected = torch.stack([reference.per_channel_rows([x]).var(1) for x in data]).mean(0)
    torch.testing.assert_close(bn.running_var, expected, **EXACT)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0])
def test_moving_average_is_that_of_torch_in_training_mode(momentum):
    net, data = make_net(), batches(6)
    theirs = copy.deepcopy(net)
    recompute_population_statistics(net, data, estimator="moving_average", momentum=momentum)
    theirs.train()
    theirs.drop.eval()
    theirs.first.momentum = theirs.second.momentum = momentum
    for batch in data:
        theirs(batch)
    for norm, expected in ((net.first, theirs.first), (net.second, theirs.second)):
        torch.testing.assert_close(norm.running_mean, expected.running_mean, **EXACT)
        torch.testing.assert_close(norm.running_var, expected.running_var, **EXACT)


def test_empty_batches_move_no_average():
    ours, theirs, data = nn.BatchNorm2d(NUM_CHANNELS).double(), nn.BatchNorm2d(NUM_CHANNELS).double(), batches()
    empty = torch.empty(0, NUM_CHANNELS, 3, 3).double()
    recompute_population_statistics(ours, [data[0], empty, *data[1:], empty], estimator="moving_average")
    for batch in data:
        theirs(batch)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **EXACT)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **EXACT)


def test_layer_by_layer_is_its_definition():
    """Each norm on what the norms before it give by their new statistics, also where it is called twice."""
    model, data = make_deep(), batches()
    before = snapshot(model)
    report = recompute_population_statistics(model, data, estimator="layer_by_layer")
    with torch.no_grad():
        assert_population(model.begin, data)
        middle = [model.conv(normalize(model.begin, x)).relu() for x in data]
        assert_population(model.middle, middle)
        last = [normalize(model.middle, x) for x in middle]
        assert_population(model.twice, [*last, *(2 * x + 1 for x in last)])
    assert [estimate.path for estimate in report.not_reached] == ["unused"]
    assert (report.num_batches, report.num_samples) == (4, sum(len(x) for x in data))
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0] if key.startswith(("unused", "conv")))


def test_layer_by_layer_ends_a_forward_at_its_norm():
    """Of 4 batches: one pass to find the order, one for each reached norm; each pass goes as far as its norm."""
    model = make_deep()
    recompute_population_statistics(model, batches(), estimator="layer_by_layer")
    assert model.counts == {"begin": 16, "middle": 12, "twice": 8}


@pytest.mark.parametrize("row", ROWS)
def test_layer_by_layer_does_not_depend_on_the_split(row):
    """Nor on what the running statistics were before."""
    results = []
    for seed, size in enumerate((1, 3, 18)):
        torch.manual_seed(0)
        model = nn.ModuleList([make_norm(NormSpec.from_table5_row(row)), nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1)])
        model.extend([make_norm(NormSpec.from_table5_row(row)), randomize(nn.BatchNorm2d(NUM_CHANNELS))]).double()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(seed)

        def forward(model, x):
            features = dict(zip(LEVELS, (x, x[..., :1] + 1, 2 * x[..., :1, :]), strict=True))
            features = model[2]({level: model[1](x) for level, x in model[0](features).items()})
            for feature in features.values():
                model[3](feature)

        recompute_population_statistics(model, split(batches(), size), forward=forward, estimator="layer_by_layer")
        results.append({k: v for k, v in model.state_dict().items() if k.endswith(("running_mean", "running_var"))})
    torch.testing.assert_close(results[1], results[0], **EXACT)
    torch.testing.assert_close(results[2], results[0], **EXACT)


def test_layer_by_layer_with_single_images_of_one_position():
    """Which torch's own norm refuses in training mode."""
    bn, data = nn.BatchNorm2d(NUM_CHANNELS).double(), split(batches(), 1)
    data = [x[..., :1, :1] for x in data]
    recompute_population_statistics(nn.Sequential(bn), data, estimator="layer_by_layer")
    assert_population(bn, data)


def test_layer_by_layer_of_a_layer_that_is_in_two_places():
    bn = randomize(nn.BatchNorm2d(NUM_CHANNELS).double())
    model = nn.ModuleDict({"a": bn, "b": bn})
    data = batches()
    recompute_population_statistics(
        model, data, forward=lambda m, x: (m["a"](x), m["b"](x - 1)), estimator="layer_by_layer"
    )
    assert_population(bn, [*data, *(x - 1 for x in data)])


def test_layer_by_layer_with_limits():
    model, data = make_deep(), batches()
    report = recompute_population_statistics(model, data, estimator="layer_by_layer", num_batches=2)
    assert report.num_batches == 2
    assert_population(model.begin, data[:2])
    report = recompute_population_statistics(model, data, estimator="layer_by_layer", num_samples=8)
    assert report.num_samples == 3 + 4 + 5
    assert_population(model.begin, data[:3])


def test_layer_by_layer_refuses_what_can_be_read_once_only():
    model = make_deep()
    before = snapshot(model)
    for data in ((x for x in batches()), iter(batches())):
        with pytest.raises(
            StatisticsError, match=r"must be a list or a loader.*got an iterator \((gen|list_it).*Make a"
        ):
            recompute_population_statistics(model, data, estimator="layer_by_layer")
    assert_as_before(model, before)


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_layer_by_layer_after_an_error_leaves_the_model_as_it_was(error):
    """In the third pass, when statistics of the first norm are in place."""
    model, seen = make_deep().train(), []
    before = snapshot(model)

    def forward(model, x):
        seen.append(x)
        if len(seen) == 10:
            raise error
        model(x)

    with pytest.raises(type(error)):
        recompute_population_statistics(model, batches(), forward=forward, estimator="layer_by_layer")
    assert len(seen) == 10
    assert_as_before(model, before)


def test_pooled_is_independent_of_the_split_of_a_first_norm():
    results = []
    for size in (1, 5, 18):
        bn = nn.BatchNorm2d(NUM_CHANNELS).double()
        recompute_population_statistics(bn, split(batches(), size))
        results.append(torch.stack([bn.running_mean, bn.running_var]))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    torch.testing.assert_close(results[2], results[0], **EXACT)


def test_all_levels_are_estimated_by_the_mean_of_their_batches():
    norm = make_norm(NormSpec.from_table5_row(4))
    data = [make_features(seed) for seed in range(3)]
    recompute_population_statistics(norm, data, estimator="mean_of_batches")
    for level in LEVELS:
        means = torch.stack([batch[level].mean([0, 2, 3]) for batch in data])
        torch.testing.assert_close(norm.population_state(level).running_mean, means.mean(0), **EXACT)

"""Population statistics over several workers: those of one process on all the data, and equal on every worker."""

import pytest
import torch
from torch import nn

from bnext import StatisticsError, recompute_population_statistics
from bnext.layers import NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, make_features, make_norm
from tests.workers import run_workers

SPECS = [NormSpec.from_table5_row(1), NormSpec.from_table5_row(3), NormSpec.from_table5_row(4)]


def make_data(rank, world_size):
    """Uneven numbers of batches, of samples and of image sizes; the last of three workers has no data."""
    if rank == 2:
        return []
    sizes = ((1 + rank, 6 - rank, 4), (1 + rank, 3, 2 + rank), (2, 2, 1))
    return [make_features(seed=10 * rank + step, sizes=sizes) for step in range(2 + world_size - rank)]


def make_model(spec):
    return nn.ModuleDict(
        {"level": make_norm(spec), "unused": nn.BatchNorm2d(3), "bn": nn.BatchNorm2d(NUM_CHANNELS).double()}
    )


def forward(model, features):
    """A plain norm on the finest level alone, and the level norm on all."""
    model["bn"](features["p3"])
    model["level"](features)


def recompute(rank, world_size):
    results = []
    for spec in SPECS:
        model = make_model(spec)
        report = recompute_population_statistics(model, make_data(rank, world_size), forward=forward)
        state = model.state_dict()
        results.append((state, report))
    return results


def recompute_from_other_averages(rank, world_size):
    """Every worker's moving average is another one, as detectron2's are."""
    bn = nn.BatchNorm2d(NUM_CHANNELS).double()
    bn.running_mean.fill_(rank)
    bn.running_var.fill_(1.0 + rank)
    data = [features["p3"] for features in make_data(rank, world_size)]
    report = recompute_population_statistics(nn.Sequential(bn), data, source_samples=24)
    return bn.running_mean, bn.running_var, report


def recompute_wrapped(rank, world_size):
    """DistributedDataParallel would send the first worker's buffers to all in every forward."""
    net = nn.Sequential(nn.Conv2d(NUM_CHANNELS, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).double()
    net[2].running_mean.fill_(rank)
    model = nn.parallel.DistributedDataParallel(net)
    net[2].running_mean.fill_(rank)  # wrapping has sent them, too
    data = [features["p3"] for features in make_data(rank, world_size)]
    report = recompute_population_statistics(model, data, layers=lambda path, module: path == "1")
    return net[1].running_mean, net[2].running_mean, report.estimates[0].path


def recompute_with_one_nan(rank, world_size):
    model = make_model(SPECS[0])
    data = make_data(rank, world_size)
    if rank == 1:
        data[0]["p3"][:] = float("nan")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        recompute_population_statistics(model, data, forward=forward)
    except StatisticsError as error:
        return str(error), all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return "", False


def test_a_failure_of_one_worker_ends_all_and_changes_nothing():
    (first, is_first_kept), (second, is_second_kept) = run_workers(recompute_with_one_nan, 2, 2)
    assert "a failure on worker 1" in first
    assert "activations must be finite" in second
    assert is_first_kept
    assert is_second_kept


def test_former_statistics_that_differ_count_as_one_population():
    (mean, var, report), *others = run_workers(recompute_from_other_averages, 2, 2)
    assert torch.equal(mean, others[0][0])
    assert torch.equal(var, others[0][1])
    assert report == others[0][2]
    data = [features["p3"] for rank in range(2) for features in make_data(rank, 2)]
    _, pooled, _ = reference.moments_of(data)
    number = sum(map(len, data))
    torch.testing.assert_close(mean, (number * pooled + 24 * 0.5) / (number + 24), rtol=1e-12, atol=1e-12)


def test_a_wrapped_model_is_estimated_without_its_wrapper():
    (mean, other, path), (mean_too, other_too, _) = run_workers(recompute_wrapped, 2, 2)
    assert torch.equal(mean, mean_too)
    assert (other.tolist(), other_too.tolist(), path) == ([0.0, 0.0], [1.0, 1.0], "1")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_agree_with_one_process_on_all_data(world_size):
    results = run_workers(recompute, world_size, world_size)
    data = [batch for rank in range(world_size) for batch in make_data(rank, world_size)]
    for index, spec in enumerate(SPECS):
        alone = make_model(spec)
        expected = recompute_population_statistics(alone, data, forward=forward)
        states, reports = zip(*(result[index] for result in results), strict=True)
        for state in states:
            assert all(torch.equal(value, states[0][key]) for key, value in state.items()), "workers differ"
            for key, value in state.items():
                torch.testing.assert_close(value, alone.state_dict()[key], rtol=1e-12, atol=1e-12)
        for report in reports:
            assert report.estimates == reports[0].estimates
            assert [e.count for e in report.estimates] == [e.count for e in expected.estimates]
            assert [e.path for e in report.not_reached] == ["unused"]
        assert {report.num_batches for report in reports} == {expected.num_batches}
        assert_is_the_definition(states[0], spec, data)


def assert_is_the_definition(state, spec, data):
    for level in LEVELS:
        seen = LEVELS if spec.population == "shared" else [level]
        prefix = "level." if spec.population == "shared" else f"level.{level}."
        count, mean, var = reference.moments_of([batch[name] for batch in data for name in seen])
        torch.testing.assert_close(state[f"{prefix}running_mean"], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[f"{prefix}running_var"], var * count / (count - 1), rtol=1e-12, atol=1e-12)


def recompute_in_lock_step(rank):
    """Norms that share their mini-batch over workers: every worker has as many batches as the others."""
    model = make_model(NormSpec.from_table5_row(1, workers="all"))
    recompute_population_statistics(model, make_data(rank, 2)[:2], forward=forward)
    return dict(model.state_dict())


def test_norms_over_all_workers_are_re_estimated_too():
    first, second = run_workers(recompute_in_lock_step, 2)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    data = [batch for rank in range(2) for batch in make_data(rank, 2)[:2]]
    assert_is_the_definition(first, NormSpec.from_table5_row(1), data)

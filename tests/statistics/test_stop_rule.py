"""A re-estimation ends when it knows enough, at its limits, or with the data; on all workers at once."""

import pytest
import torch
from torch import nn

from bnext import recompute_population_statistics
from bnext.layers import LevelBatchNorm2d, NormSpec
from bnext.statistics import PopulationEstimate, RecomputeReport
from tests.cases import NUM_CHANNELS, randomize
from tests.statistics.models import assert_population
from tests.workers import run_workers

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def make_batch(step, samples=2, side=4):
    """Unit variance within an image, and an image's mean of standard deviation 0.3."""
    generator = torch.Generator().manual_seed(step)
    mean = torch.randn(samples, NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) * 0.3
    return torch.randn(samples, NUM_CHANNELS, side, side, generator=generator, dtype=torch.float64) + mean


class Counting:
    """Batches, and how many were taken."""

    def __init__(self, number, **sizes):
        self.number, self.sizes, self.taken = number, sizes, 0

    def __iter__(self):
        for step in range(self.number):
            self.taken += 1
            yield make_batch(step, **self.sizes)


def test_it_stops_at_the_first_look_that_finds_the_tolerance():
    """The same errors as numpy's of what was used; the look before was above."""
    data, bn = Counting(400), nn.BatchNorm2d(NUM_CHANNELS).double()
    report = recompute_population_statistics(bn, data, tolerance=0.05)
    used = report.num_batches
    assert 8 < used < 400
    assert used % 4 == 0
    assert data.taken == used
    assert_population(bn, [make_batch(step) for step in range(used)])
    (estimate,) = report.estimates
    assert max(estimate.mean_error, estimate.var_error) == estimate.error <= 0.05
    assert not report.not_converged
    means = torch.stack([make_batch(step).mean([0, 2, 3]) for step in range(used)])
    error = means.std(0) / used**0.5 / (bn.running_var * (1 - 1 / estimate.count) + bn.eps).sqrt()
    assert estimate.mean_error == pytest.approx(float(error.quantile(0.95)), rel=1e-9)
    (earlier,) = recompute_population_statistics(bn, Counting(used - 4)).estimates
    assert earlier.error > 0.05


def test_not_before_eight_batches():
    data = Counting(40)
    assert recompute_population_statistics(nn.BatchNorm2d(NUM_CHANNELS).double(), data, tolerance=10.0).num_batches == 8
    assert data.taken == 8


def test_what_has_not_converged_is_said():
    report = recompute_population_statistics(nn.BatchNorm2d(NUM_CHANNELS).double(), Counting(12), tolerance=1e-4)
    assert report.num_batches == 12
    assert [estimate.path for estimate in report.not_converged] == [""]
    assert "not converged: " in str(report)
    assert "of a tolerance of 0.01 % after 12 batches" in str(report)
    without = recompute_population_statistics(nn.BatchNorm2d(NUM_CHANNELS).double(), Counting(12))
    assert not without.not_converged


def test_the_coarsest_of_many_are_named_and_the_others_counted():
    rows = [PopulationEstimate(f"bn{k}", (), 5, 2, 2, mean_error=k / 100, var_error=0.0) for k in range(1, 10)]
    text = str(RecomputeReport(tuple(rows), 2, tolerance=0.005))
    named = [line.split()[2] for line in text.splitlines() if "standard error" in line and "not converged" in line]
    assert named == ["bn9,", "bn8,", "bn7,", "bn6,", "bn5,"]
    assert "  not converged: 4 more, up to 4 %" in text.splitlines()


def test_the_coarsest_of_several_sets_decides_and_one_that_is_not_reached_does_not():
    """p7 has one position; a set that nothing reaches has no error to wait for."""
    spec = NormSpec(statistics="per_level", population="per_level", affine="shared")
    norm = LevelBatchNorm2d(NUM_CHANNELS, ("p3", "p7", "unused"), spec).double()

    def forward(model, x):
        model({"p3": x, "p7": x[:, :, :1, :1]})

    report = recompute_population_statistics(norm, Counting(3000), forward=forward, tolerance=0.05)
    fine, coarse, unused = report.estimates
    assert not unused.is_reached
    assert fine.error < coarse.error <= 0.05
    assert report.num_batches < 3000
    alone = recompute_population_statistics(norm, Counting(3000), forward=lambda m, x: m({"p3": x}), tolerance=0.05)
    assert alone.num_batches < report.num_batches


def test_a_dead_channel_does_not_keep_it_from_stopping():
    bn = nn.BatchNorm2d(NUM_CHANNELS).double()
    data = [make_batch(step) * torch.tensor([1.0, 1, 1, 0]).view(-1, 1, 1) for step in range(200)]
    assert recompute_population_statistics(bn, data, tolerance=0.1).num_batches < 200


def test_num_samples_counts_images_and_both_limits_hold():
    def run(**limits):
        data = Counting(30, samples=3)
        report = recompute_population_statistics(nn.BatchNorm2d(NUM_CHANNELS).double(), data, **limits)
        assert data.taken == report.num_batches
        return report.num_batches, report.num_samples

    assert run(num_samples=10) == (4, 12)
    assert run(num_samples=12) == (4, 12)
    assert run(num_samples=10, num_batches=2) == (2, 6)
    assert run(num_samples=10, num_batches=20) == (4, 12)
    assert run(num_samples=1000) == (30, 90)
    assert run(num_samples=60, tolerance=10.0) == (8, 24)


def make_model():
    model = nn.ModuleDict({"bn": nn.BatchNorm2d(NUM_CHANNELS), "last": nn.BatchNorm2d(NUM_CHANNELS)})
    return randomize(model.double())


def forward(model, x):
    model["last"](model["bn"](x).relu())


def share(rank, world_size, number):
    """Uneven: the last worker has the remainder, the second of three has nothing."""
    if world_size == 3:
        return [] if rank == 1 else [make_batch(step) for step in range(number) if step % 3 == rank or step % 3 == 1]
    return [make_batch(100 * rank + step, samples=2 + rank) for step in range(number - 3 * rank)]


RUNS = {
    "all": {},
    "batches": {"num_batches": 5},
    "samples": {"num_samples": 31},
    "tolerance": {"tolerance": 0.06},
    "mean": {"estimator": "mean_of_batches"},
    "layers": {"estimator": "layer_by_layer"},
    "source": {"source_samples": 20},
    "population": {"population_size": 90},
}


def run_all(rank, world_size):
    results = {}
    for name, arguments in RUNS.items():
        number = 60 if name == "tolerance" else 11
        data = share(rank, world_size, number)
        model = make_model()
        report = recompute_population_statistics(model, data, forward=forward, **arguments)
        results[name] = dict(model.state_dict()), report
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_stop_together_and_are_one_process(world_size):
    """Uneven shares, a worker without data; float64 to 1e-12 and bitwise equal on every worker."""
    workers = run_workers(run_all, world_size, world_size)
    for name, arguments in RUNS.items():
        states, reports = zip(*(result[name] for result in workers), strict=True)
        assert all(report == reports[0] for report in reports), name
        for state in states:
            assert all(torch.equal(value, states[0][key]) for key, value in state.items()), name
        number = 60 if name == "tolerance" else 11
        shares = [share(rank, world_size, number) for rank in range(world_size)]
        rounds = [[own[step] for own in shares if step < len(own)] for step in range(max(map(len, shares)))]
        if name == "batches":
            rounds = rounds[:5]
        data, taken = [], 0
        for batch in rounds:  # of all workers: a round is used wholly
            if name in ("samples", "tolerance") and taken >= reports[0].num_samples:
                break
            data += batch
            taken += sum(map(len, batch))
        alone = make_model()
        kept = {k: v for k, v in arguments.items() if k not in ("num_batches", "num_samples", "tolerance")}
        expected = recompute_population_statistics(alone, data, forward=forward, **kept)
        torch.testing.assert_close(
            states[0], dict(alone.state_dict()), **EXACT, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert (reports[0].num_batches, reports[0].num_samples) == (expected.num_batches, expected.num_samples)
        for own, other in zip(reports[0].estimates, expected.estimates, strict=True):
            assert (own.count, own.num_samples, own.num_batches) == (other.count, other.num_samples, other.num_batches)
            assert own.error == pytest.approx(other.error, rel=1e-9)
    tolerance = workers[0]["tolerance"][1]
    assert max(estimate.error for estimate in tolerance.estimates) <= 0.06
    assert tolerance.num_batches < sum(len(share(rank, world_size, 60)) for rank in range(world_size))


def run_in_lock_step(rank):
    spec = NormSpec(statistics="shared", population="shared", workers="all")
    results = []
    for estimator in ("pooled", "layer_by_layer"):
        model = nn.ModuleList([LevelBatchNorm2d(NUM_CHANNELS, ["p3"], spec), nn.BatchNorm2d(NUM_CHANNELS)]).double()
        report = recompute_population_statistics(
            model,
            share(rank, 2, 7),
            forward=lambda m, x: m[1](m[0]({"p3": x})["p3"]),
            estimator=estimator,
        )
        results.append((report.num_batches, dict(model.state_dict())))
    return results


def test_norms_over_all_workers_end_with_the_shortest_share():
    """7 and 4 batches. Layer by layer nothing is shared meanwhile, and all of them are used."""
    first, second = run_workers(run_in_lock_step, 2)
    for (number, state), (other_number, other_state), expected in zip(first, second, (8, 11), strict=True):
        assert number == other_number == expected
        assert all(torch.equal(value, other_state[key]) for key, value in state.items())
    shares = [share(rank, 2, 7) for rank in range(2)]
    for (_, state), data in zip(first, (shares[0][:4] + shares[1], shares[0] + shares[1]), strict=True):
        values = torch.cat([x.movedim(1, 0).flatten(1) for x in data], 1)
        torch.testing.assert_close(state["0.running_mean"], values.mean(1), **EXACT)
        torch.testing.assert_close(state["0.running_var"], values.var(1), **EXACT)


def run_moving_average(rank):
    model = make_model()
    data = share(rank, 2, 7) if rank == 0 else []
    recompute_population_statistics(model, data, forward=forward, estimator="moving_average")
    return dict(model.state_dict())


def test_a_worker_without_data_has_no_share_in_a_moving_average():
    first, second = run_workers(run_moving_average, 2)
    alone = make_model()
    recompute_population_statistics(alone, share(0, 2, 7), forward=forward, estimator="moving_average")
    torch.testing.assert_close(first, dict(alone.state_dict()), **EXACT)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def fail_in_the_middle(rank):
    """One worker's loader, forward, or wish fails; the other hears of it, and both keep their statistics."""
    messages = []
    for place in ("loader", "forward", "domain"):
        model = make_model()
        before = {key: value.clone() for key, value in model.state_dict().items()}

        def load(place=place):
            yield from share(0, 2, 9)
            if rank == 1 and place == "loader":
                raise OSError("disk")

        def call(model, x, place=place):
            if rank == 1 and place == "forward":
                raise OSError("no forward")
            forward(model, x)

        def choose(batch, place=place):
            if rank == 1 and place == "domain":
                raise OSError("no domain")
            return "day"

        try:
            recompute_population_statistics(model, load(), forward=call, domain=choose, tolerance=1e-6)
            messages.append("")
        except (OSError, ValueError) as error:
            messages.append(str(error))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return messages


def test_a_failure_of_one_worker_reaches_the_other():
    first, second = run_workers(fail_in_the_middle, 2)
    assert second == ["disk", "no forward", "no domain"]
    assert all("got a failure on worker 1" in message for message in first)

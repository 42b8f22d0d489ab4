"""A mini-batch with inf or NaN, as an overflow whose step AMP skips: running statistics are as if it had not been."""

import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.counts import count_skipped, tell_skipped
from bnext.layers.deal import deal_statistics
from bnext.layers.spec import NormSpec
from bnext.layers.virtual import virtual_samples
from bnext.scope import use_domain
from bnext.scope.statistics import frozen_statistics
from tests.cases import CASES, LEVELS, Case, find_owner, make_case
from tests.workers import run_workers

BROKEN = [float("inf"), float("-inf"), float("nan")]


def spoil(inputs, value=float("inf"), name=None):
    """The same features with one broken number."""
    spoiled = {key: x.clone() for key, x in inputs.items()}
    spoiled[name or next(iter(spoiled))][0, 1, 0, 0] = value
    return spoiled


def statistics_of(norm):
    return {key: value.clone() for key, value in norm.state_dict().items() if "running" in key or "num" in key}


def assert_same(norm, other):
    torch.testing.assert_close(statistics_of(norm), statistics_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_as_without_the_mini_batch(case: Case):
    norm, other = case.build().train(), case.build().train()
    spoiled = spoil(case.inputs(1))
    for name in list(spoiled)[1:]:
        spoiled[name] = spoil({name: spoiled[name]})[name]

    case.call(norm, case.inputs(0))
    case.call(norm, spoiled)
    case.call(norm, case.inputs(2))
    for seed in (0, 2):
        case.call(other, case.inputs(seed))

    if isinstance(case.active, tuple):  # a domain without a broken number goes on by itself
        kept = [find_owner(case.spec.population, level, case.active[0]) for level in case.levels or ("",)]
        kept_state = {key: value for key, value in statistics_of(norm).items() if key.rpartition(".")[0] in kept}
        if case.spec.statistics == "shared" or any(kept):
            expected = statistics_of(other)
            torch.testing.assert_close(kept_state, {key: expected[key] for key in kept_state}, rtol=0, atol=0)
        assert all(value.isfinite().all() for value in statistics_of(norm).values())
    else:
        assert_same(norm, other)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_broken_number_and_type(value, dtype):
    norm, other = BatchNorm2d(4).train(), BatchNorm2d(4).train()
    norm, other = (module.double() if dtype == torch.float64 else module for module in (norm, other))
    good = torch.randn(3, 4, 5, 5).to(dtype)
    bad = spoil({"x": good}, value)["x"]
    for x in (good, bad, good):
        norm(x)
    for x in (good, good):
        other(x)
    assert_same(norm, other)
    assert int(norm.num_batches_tracked) == 2
    assert count_skipped([norm]) == [1]


def test_levels_with_populations_of_their_own_are_left_out_alone():
    case = make_case({"sources": "levels", "statistics": "own", "population": "own"})
    norm = case.build().train()
    before = statistics_of(norm)
    case.call(norm, spoil(case.inputs(), name="p4"))
    moved = {key.partition(".")[0] for key, value in statistics_of(norm).items() if not torch.equal(value, before[key])}
    assert moved == set(LEVELS) - {"p4"}
    assert count_skipped([norm]) == [1]


def test_domains_are_left_out_alone():
    norm = BatchNorm2d(4, NormSpec(statistics="per_domain", population="per_domain", domains=("day", "night"))).train()
    x = torch.randn(4, 4, 3, 3)
    x[0] = float("nan")
    with use_domain(["night", "day", "night", "day"]):
        norm(x)
    assert [int(norm.get_submodule(name).num_batches_tracked) for name in ("day", "night")] == [1, 0]
    assert norm.day.running_mean.isfinite().all()
    assert not norm.night.running_mean.any()


def test_a_deal_and_virtual_samples():
    model = nn.Sequential(BatchNorm2d(4)).train()
    x = torch.randn(6, 4, 3, 3)
    bad = spoil({"x": x})["x"]
    deal = deal_statistics(model, num_groups=2)
    model(bad)
    deal.remove()
    with virtual_samples(model, x):
        model(bad)
    with virtual_samples(model, bad):
        model(x)
    assert_same(model, nn.Sequential(BatchNorm2d(4)))
    assert count_skipped([model[0]]) == [3]


def share_an_overflow(rank):
    norm = BatchNorm2d(4, NormSpec(workers="all")).train()
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(rank))
    norm(spoil({"x": x})["x"] if rank == 1 else x)
    return statistics_of(norm), count_skipped([norm])


@pytest.mark.slow
def test_workers_leave_it_out_together():
    for statistics, skipped in run_workers(share_an_overflow, 2):
        torch.testing.assert_close(statistics, statistics_of(BatchNorm2d(4)), rtol=0, atol=0)
        assert skipped == [1]


@pytest.mark.parametrize("average", ["moving", pytest.param("cumulative", marks=pytest.mark.slow)])
def test_compiled(average):
    torch._dynamo.reset()
    norm, other = (BatchNorm2d(4, NormSpec(average=average)).train() for _ in range(2))
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    good = torch.randn(4, 4, 3, 3)
    for x in (good, spoil({"x": good})["x"], good):
        compiled(x)
    other(good), other(good)
    torch.testing.assert_close(statistics_of(norm), statistics_of(other))


def test_exported_and_stacked_norms_move_by_themselves():
    good = torch.randn(4, 4, 3, 3)
    norm, other = BatchNorm2d(4).train(), BatchNorm2d(4).train()
    exported = torch.export.export(norm, (good,)).module()
    for x in (good, spoil({"x": good})["x"]):
        exported(x)
    other(good)
    torch.testing.assert_close(dict(exported.named_buffers()), dict(other.named_buffers()))

    norms = [BatchNorm2d(4).train() for _ in range(2)]
    parameters, buffers = stack_module_state(norms)
    each = torch.stack([good, spoil({"x": good})["x"]])
    vmap(lambda p, b, x: functional_call(norms[0], (p, b), (x,)))(parameters, buffers, each)
    assert buffers["num_batches_tracked"].tolist() == [1, 0]
    torch.testing.assert_close(buffers["running_mean"], torch.stack([other.running_mean, torch.zeros(4)]))


def test_what_does_not_move_counts_nothing():
    norm = BatchNorm2d(4).train()
    bad = spoil({"x": torch.randn(3, 4, 5, 5)})["x"]
    with frozen_statistics(norm):
        norm(bad)
    norm.eval()(bad)
    norm.train()(bad[:0])
    assert count_skipped([norm]) == [0]


def test_nothing_is_read_from_the_device(monkeypatch):
    norms = [BatchNorm2d(4), BatchNorm2d(4, NormSpec(normalization_batch_size=2)), BatchNorm2d(4, NormSpec())]
    norms[2].momentum = None
    x = torch.randn(4, 4, 3, 3)

    def refuse(self, *args):
        raise AssertionError("a read from the device")

    for name in ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for norm in norms:
        assert norm(x).shape == x.shape


def test_counts_are_in_no_state_dict_and_said_once(caplog):
    model = nn.Sequential(BatchNorm2d(4), nn.ReLU()).train()
    keys = set(model.state_dict()), [name for name, _ in model.named_buffers()]
    model(torch.full((2, 4, 3, 3), float("nan")))
    assert (set(model.state_dict()), [name for name, _ in model.named_buffers()]) == keys
    tell = partial(tell_skipped, model)
    tell({"0": 0})
    assert caplog.records == []
    tell(dict(zip("0", count_skipped([model[0]]), strict=True)))
    tell({"0": 2})
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("1 mini-batches")
    assert "of 0." in said[0]

"""Norms that are called together equal the same norms one after the other; what they send is sent at once."""

import contextlib
import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bnext.errors import ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec, normalize_together
from tests.cases import CASES, LEVELS, NUM_CHANNELS, make_features, make_norm, pick_cases
from tests.collectives import NotedCollectives
from tests.workers import run_workers

# Sizes (N, H, W) of the three levels, per worker: other image sizes, nothing at all.
SHARES = {
    1: [[(2, 6, 5), (2, 3, 3), (2, 2, 1)]],
    2: [[(2, 4, 6), (2, 2, 3), (2, 1, 2)], [(2, 8, 4), (2, 4, 2), (2, 2, 1)]],
    3: [[(2, 4, 4), (2, 2, 2), (2, 1, 2)], [(0, 6, 6), (0, 3, 3), (0, 2, 2)], [(2, 8, 6), (2, 4, 3), (2, 2, 2)]],
}
ROW1, ROW4 = (NormSpec.from_table5_row(row, workers="all") for row in (1, 4))


def call_each(norms, inputs):
    return [norm(features) for norm, features in zip(norms, inputs, strict=True)]


def run_step(call, norms, share, seed):
    """What a worker computes in a step, and what it has sent in it."""
    inputs = [make_features(seed + 100 * number, tuple(share), requires_grad=True) for number in range(len(norms))]
    with NotedCollectives() as sent:
        outputs = [list(output.values()) for output in call(norms, inputs)]
        loss = sum((number + 1) * y.square().sum() for number, ys in enumerate(outputs) for y in ys)
        loss.backward()

    gradients = [feature.grad for features in inputs for feature in features.values()]
    return (outputs, gradients), sent


def compare(norms, share, rank, scope=None):
    """A step together and one after the other: (collectives, bytes) of both."""
    same = copy.deepcopy(norms)
    with scope(share[0][0]) if scope else contextlib.nullcontext():
        results, together = run_step(normalize_together, norms, share, rank)
        expected, alone = run_step(call_each, same, share, rank)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)

    for norm, other in zip(norms, same, strict=True):
        torch.testing.assert_close(norm.state_dict(), other.state_dict(), rtol=1e-12, atol=1e-12)
        for parameter, right in zip(norm.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, right.grad, rtol=1e-12, atol=1e-12)
    return [(len(sent.names), sent.num_bytes) for sent in (together, alone)]


def compare_cases(rank, cases, shares):
    return {
        name: compare([case.build(seed=seed).train() for seed in (1, 2)], shares[rank], rank, case.scope)
        for name, case in cases.items()
    }


@pytest.mark.parametrize("world_size", SHARES)
def test_every_norm_over_levels(world_size):
    cases = {}
    for param in CASES if world_size == 2 else pick_cases("levels-row1", "pairs-renorm", "groups-pairs"):
        (case,) = param.values
        if case.levels:
            spec = case.spec.replace(workers="all", normalization_batch_size=None)
            cases[param.id] = dataclasses.replace(case, spec=spec)

    for sent in run_workers(compare_cases, world_size, cases, SHARES[world_size]):
        for name, ((number, num_bytes), (number_alone, num_bytes_alone)) in sent.items():
            if world_size == 1 or cases[name].spec.has_frozen_statistics:
                assert number_alone == 0
            elif cases[name].spec.training == "population":  # no collective backward, and each for itself
                assert number == number_alone <= 2, name
            else:
                assert (number, number_alone) == (2, 4), name
            assert num_bytes == num_bytes_alone


def compare_mixtures(rank, mixtures, shares):
    return [compare([make_norm(spec).train() for spec in specs], shares[rank], rank) for specs in mixtures]


def test_norms_of_different_answers():
    by_population = ROW1.replace(training="population", frozen="none")
    mixtures = {
        (ROW1, ROW4): 2,
        (ROW1, ROW4.replace(training="renorm")): 2,
        (ROW1, ROW1, ROW4): 2,
        (ROW1, ROW1.replace(eps=1e-2)): 4,
        (ROW1, ROW1.replace(workers="one")): 2,
        (ROW1.replace(workers="one"), ROW1): 2,
        (ROW1, ROW1.replace(frozen="both")): 2,
        (ROW1, by_population, ROW4): 3,
        (by_population, ROW1, ROW1): 3,
    }
    for results in run_workers(compare_mixtures, 2, list(mixtures), SHARES[2]):
        for (specs, number), (together, alone) in zip(mixtures.items(), results, strict=True):
            assert together[0] == number, specs
            assert together[1] == alone[1]


def call_single_elements(rank, spec):
    """Of both norms worker 0 has the only element."""
    norms = [make_norm(spec, seed=seed).train() for seed in (1, 2)]
    return compare(norms, [(1 - rank, 1, 1), (0, 1, 1), (0, 1, 1)], 0)


def test_a_single_element_over_all_workers():
    run_workers(call_single_elements, 2, ROW1.replace(single_element="population"))


# ---- hooks, of one worker alone


def watch(norms, calls):
    """Hooks as of a probe; of the first norm one changes the input, of the second the output."""
    for number, norm in enumerate(norms):
        norm.register_forward_pre_hook(lambda *_, number=number: calls.append(f"before {number}"))
        norm.register_forward_hook(lambda *_, number=number: calls.append(f"after {number}"))
    norms[0].register_forward_pre_hook(lambda norm, args: ({level: 2 * x for level, x in args[0].items()},))
    norms[1].register_forward_hook(lambda norm, args, output: {level: 3 * y for level, y in output.items()})


def hook_one_worker(rank, shares):
    norms = [make_norm(ROW1, seed=seed).train() for seed in (1, 2)]
    same, calls = copy.deepcopy(norms), []
    if rank == 0:
        watch(norms, calls)
        watch(same, [])
    results, together = run_step(normalize_together, norms, shares[rank], rank)
    expected, _ = run_step(call_each, same, shares[rank], rank)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
    return calls, together.names


def test_hooks_of_one_worker_see_every_call_and_others_do_not_wait():
    (calls, sent), (nothing, other_sent) = run_workers(hook_one_worker, 2, SHARES[2], timeout=30)
    assert calls == ["before 0", "before 1", "after 1", "after 0"]
    assert nothing == []
    assert sent == other_sent == ["allgather_", "allreduce_"]


def fail_and_go_on(rank, shares):
    norms = [make_norm(ROW1, seed=seed).train() for seed in (1, 2)]
    before = copy.deepcopy(norms[0].state_dict())
    handle = norms[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_step(normalize_together, norms, shares[rank], rank)
    handle.remove()
    torch.testing.assert_close(norms[0].state_dict(), before, rtol=0, atol=0)
    compare(norms, shares[rank], rank)


def test_a_call_that_fails_leaves_nothing_waiting():
    run_workers(fail_and_go_on, 2, SHARES[2], timeout=30)


# ---- what else runs norms


def call_checkpointed(use_reentrant, norms, inputs):
    def call(*tensors):
        given = iter(tensors)
        by_level = [{level: next(given) for level in features} for features in inputs]
        return tuple(y for output in normalize_together(norms, by_level) for y in output.values())

    tensors = [feature for features in inputs for feature in features.values()]
    outputs = iter(checkpoint(call, *tensors, use_reentrant=use_reentrant))
    return [{level: next(outputs) for level in features} for features in inputs]


def recompute(rank, shares):
    counts = []
    for use_reentrant in (False, True):
        norms = [make_norm(ROW1, seed=seed).train() for seed in (1, 2)]
        same = copy.deepcopy(norms)
        results, sent = run_step(partial(call_checkpointed, use_reentrant), norms, shares[rank], rank)
        expected, _ = run_step(normalize_together, same, shares[rank], rank)
        torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
        for norm, other in zip(norms, same, strict=True):
            torch.testing.assert_close(norm.state_dict(), other.state_dict(), rtol=0, atol=0)
        counts.append(sent.names)
    return counts


def test_activations_that_are_computed_again():
    for counts in run_workers(recompute, 2, SHARES[2], timeout=30):
        assert counts == [["allgather_", "allgather_", "allreduce_"]] * 2


def test_in_evaluation_and_without_other_workers():
    norms = [make_norm(spec).eval() for spec in (ROW1, ROW4)]
    inputs = [make_features(seed) for seed in (0, 1)]
    torch.testing.assert_close(normalize_together(norms, inputs), call_each(norms, inputs), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="1 for 2 norms"):
        normalize_together(norms, inputs[:1])
    narrow = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, ROW4).double()
    assert list(normalize_together([narrow], inputs[:1])[0]) == list(LEVELS)

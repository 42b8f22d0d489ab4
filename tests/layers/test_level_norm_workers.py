"""R workers on shards equal one process on the whole: forward, backward, buffers; uneven and empty ones too."""

import pytest
import torch

from bnext.errors import StatisticsError
from bnext.layers import NormSpec
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm
from tests.workers import run_workers

# Sizes (N, H, W) of the three levels, per worker: other numbers of samples, other image sizes, nothing at all.
SHARES = {
    1: [[(2, 6, 5), (2, 3, 3), (2, 2, 1)]],
    2: [[(1, 4, 6), (1, 2, 3), (1, 1, 2)], [(3, 8, 4), (3, 4, 2), (3, 2, 1)]],
    3: [[(2, 4, 4), (2, 2, 2), (2, 1, 1)], [(0, 6, 6), (0, 3, 3), (0, 2, 2)], [(1, 8, 6), (1, 4, 3), (1, 2, 2)]],
}
STEPS = 2


def features_and_grads(share, rank, step):
    return (make_features(seed=10 * step + rank, sizes=tuple(share)) for rank in (rank, 100 + rank))


def run_share(rank, specs, shares):
    """Per spec: outputs and input gradients per step, summed parameter gradients, state."""
    return [run_one(make_norm(spec).train(), shares[rank], rank) for spec in specs]


def run_one(norm, share, rank):
    steps = []
    for step in range(STEPS):
        features, grads = features_and_grads(share, rank, step)
        features = {level: feature.requires_grad_() for level, feature in features.items()}
        outputs = norm(features)
        torch.autograd.backward(list(outputs.values()), [grads[level] for level in outputs])
        steps.append(([outputs[level].detach() for level in LEVELS], [features[level].grad for level in LEVELS]))
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return steps, gradients, dict(norm.state_dict())


def run_whole(spec, shares):
    """One process that has every worker's features: elements of all workers side by side, as one long image."""
    norm = make_norm(spec.replace(workers="one")).train()
    steps = []
    for step in range(STEPS):
        parts = [list(features_and_grads(share, rank, step)) for rank, share in enumerate(shares)]
        features, grads = ({level: as_row([p[i][level] for p in parts]) for level in LEVELS} for i in (0, 1))
        features = {level: feature.requires_grad_() for level, feature in features.items()}
        outputs = norm(features)
        torch.autograd.backward(list(outputs.values()), [grads[level] for level in outputs])
        steps.append(([outputs[level].detach() for level in LEVELS], [features[level].grad for level in LEVELS]))
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return steps, gradients, dict(norm.state_dict())


def as_row(parts):
    return torch.cat([part.transpose(0, 1).reshape(1, NUM_CHANNELS, 1, -1) for part in parts], dim=3)


@pytest.mark.parametrize("world_size", SHARES)
def test_workers_on_shards_are_one_process_on_the_whole(world_size):
    specs = [NormSpec.from_table5_row(row, workers="all") for row in ROWS]
    shares = SHARES[world_size]
    results = run_workers(run_share, world_size, specs, shares)
    for index, spec in enumerate(specs):
        of_workers = [result[index] for result in results]
        steps, gradients, state = run_whole(spec, shares)
        for step, whole in enumerate(steps):
            for kind in (0, 1):  # outputs, input gradients
                shards = [as_row(list(parts)) for parts in zip(*(w[0][step][kind] for w in of_workers), strict=True)]
                torch.testing.assert_close(
                    shards, whole[kind], rtol=1e-10, atol=1e-10, msg=lambda m, s=spec: f"{s}\n{m}"
                )
        for name, gradient in gradients.items():
            summed = sum(w[1][name] for w in of_workers)
            torch.testing.assert_close(summed, gradient, rtol=1e-10, atol=1e-10)
        for worker in of_workers:
            torch.testing.assert_close(worker[2], state, rtol=1e-12, atol=1e-12)
            first = of_workers[0][2]
            assert all(torch.equal(worker[2][key], value) for key, value in first.items()), "workers differ"


def run_alone_in_a_world(rank, specs, shares):
    """Only the last worker calls its norms, forward and backward: with a collective it would wait for ever."""
    return run_share(rank, specs, shares) if rank == len(shares) - 1 else None


def test_workers_one_does_not_communicate():
    specs = [NormSpec.from_table5_row(row, workers="one") for row in ROWS]
    shares = SHARES[2]
    _, results = run_workers(run_alone_in_a_world, 2, specs, shares, timeout=30)
    for spec, (steps, gradients, state) in zip(specs, results, strict=True):
        expected = run_one(make_norm(spec).train(), shares[1], 1)
        torch.testing.assert_close((steps, gradients, state), expected, rtol=0, atol=1e-14)


def evaluate_one_worker(rank, spec):
    norm = make_norm(spec).eval()
    return None if rank else norm(make_features())


@pytest.mark.parametrize("row", [1, 4])
def test_evaluation_never_communicates(row):
    spec = NormSpec.from_table5_row(row, workers="all")
    outputs = run_workers(evaluate_one_worker, 2, spec, timeout=30)[0]
    torch.testing.assert_close(outputs, make_norm(spec).eval()(make_features()), rtol=0, atol=1e-14)


def backward_where_one_worker_needs_no_input_gradient(rank, spec):
    """The first layer of a frozen backbone on one worker only; its norm still owes the others its sums."""
    norm = make_norm(spec).train()
    features = make_features(seed=rank, requires_grad=rank == 0)
    outputs = norm(features)
    sum(output.square().sum() for output in outputs.values()).backward()
    return [feature.grad for feature in features.values()], norm.weight.grad


def test_a_worker_whose_features_need_no_gradient_does_not_hang_the_others():
    spec = NormSpec.from_table5_row(1, workers="all")
    results = run_workers(backward_where_one_worker_needs_no_input_gradient, 2, spec, timeout=30)
    assert all(grad is not None for grad in results[0][0])
    assert all(grad is None for grad in results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


def single_elements(rank, spec):
    norm = make_norm(spec).train()
    before = norm.running_mean.clone()
    outputs = norm({"p3": torch.full((1 - rank, NUM_CHANNELS, 1, 1), 3.0).double()})
    expected = norm.eval()({"p3": torch.full((1 - rank, NUM_CHANNELS, 1, 1), 3.0).double()})
    return outputs["p3"], expected["p3"], torch.equal(norm.running_mean, before)


def test_one_element_over_all_workers_is_normalized_by_the_population_if_asked_for():
    spec = NormSpec.from_table5_row(1, workers="all").replace(single_element="population")
    first, second = run_workers(single_elements, 2, spec)
    torch.testing.assert_close(first[0], first[1])
    assert second[0].numel() == 0
    assert first[2]
    assert second[2]


def refuse_single_elements(rank, spec):
    norm = make_norm(spec).train()
    with pytest.raises(StatisticsError, match=r"more than 1 element per channel in training; got 1"):
        norm({"p3": torch.full((1 - rank, NUM_CHANNELS, 1, 1), 3.0).double()})


def test_one_element_over_all_workers_is_refused_by_all_of_them():
    run_workers(refuse_single_elements, 2, NormSpec.from_table5_row(1, workers="all"), timeout=30)


def give_no_level(rank, training):
    norm = make_norm(NormSpec(workers="all", training=training)).train()
    with pytest.raises(StatisticsError, match="must hold a level on every worker .* Pass features without samples"):
        norm({})
    assert norm.eval()({}) == {}


@pytest.mark.parametrize("training", ["mini_batch", "population"])
def test_a_worker_without_any_level_is_told_instead_of_letting_others_wait(training):
    run_workers(give_no_level, 2, training, timeout=30)

"""Workers that share a mini-batch equal one process on the whole: values, gradients, buffers, and what they send."""

import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError, StatisticsError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope import use_domain
from tests.cases import DOMAINS, LEVELS, NUM_CHANNELS, SPECS, make_features, make_norm, randomize
from tests.collectives import NotedCollectives
from tests.workers import run_workers

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 2
SHARES = {  # (N, H, W) of each worker: other numbers of samples, other sizes, nothing at all
    1: [(3, 4, 5)],
    2: [(1, 4, 6), (3, 8, 2)],
    3: [(2, 4, 4), (0, 6, 6), (3, 1, 5)],
}
DOMAIN_SPEC = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
SPECS_OVER_ALL = {
    "plain": NormSpec(workers="all"),
    "renorm": NormSpec(workers="all", training="renorm"),
    "by_population": NormSpec(workers="all", training="population"),
    "cumulative": NormSpec(workers="all", average="cumulative"),
    "no_affine": NormSpec(workers="all", affine="none"),
    "domains": DOMAIN_SPEC.replace(workers="all"),
    "domains_renorm": DOMAIN_SPEC.replace(workers="all", training="renorm"),
    "domains_one_batch": DOMAIN_SPEC.replace(workers="all", statistics="shared"),
}


def draw(rank, step, share):
    generator = torch.Generator().manual_seed(10 * step + rank)
    n, h, w = share
    x, grad = (torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64) for _ in range(2))
    return x * (rank + 1) + rank, grad, [DOMAINS[(rank + index) % 2] for index in range(n)]


def run_steps(norm, batches):
    """Outputs and input gradients per step, parameter gradients, state."""
    steps = []
    for x, grad, names in batches:
        x = x.clone().requires_grad_()
        with use_domain(names or DOMAINS[0]):
            output = norm(x)
        output.backward(grad)
        steps.append((output.detach(), x.grad))
    zeros = {name: torch.zeros_like(p) for name, p in norm.named_parameters()}
    gradients = {name: zeros[name] if p.grad is None else p.grad for name, p in norm.named_parameters()}
    return steps, gradients, dict(norm.state_dict())


def build(spec):
    return randomize(BatchNorm2d(NUM_CHANNELS, spec).double()).train()


def run_share(rank, specs, shares):
    return {
        name: run_steps(build(spec), [draw(rank, step, shares[rank]) for step in range(STEPS)])
        for name, spec in specs.items()
    }


def to_row(x):
    """[N, C, H, W] -> [N H W, C, 1, 1]: a batch norm sees a bag of elements."""
    return x.movedim(1, -1).reshape(-1, NUM_CHANNELS, 1, 1)


def run_whole(spec, shares):
    """One process with all workers' elements as samples of a single position."""
    batches = []
    for step in range(STEPS):
        parts = [draw(rank, step, share) for rank, share in enumerate(shares)]
        names = [name for x, _, own in parts for name in own for _ in range(x.shape[2] * x.shape[3])]
        batches.append(
            (torch.cat([to_row(x) for x, _, _ in parts]), torch.cat([to_row(g) for _, g, _ in parts]), names)
        )
    return run_steps(build(spec.replace(workers="one")), batches)


def assert_whole(of_workers, whole):
    steps, gradients, state = whole
    for step, right in enumerate(steps):
        for kind in (0, 1):  # outputs, input gradients
            shards = torch.cat([to_row(worker[0][step][kind]) for worker in of_workers])
            torch.testing.assert_close(shards, right[kind], **EXACT)
    for name, gradient in gradients.items():  # each worker's own terms: DDP sums them
        torch.testing.assert_close(sum(worker[1][name] for worker in of_workers), gradient, **EXACT)
    for worker in of_workers:
        torch.testing.assert_close(worker[2], state, **EXACT)
        assert all(torch.equal(worker[2][key], value) for key, value in of_workers[0][2].items()), "workers differ"


@pytest.mark.parametrize("world_size", SHARES)
def test_all_workers_are_one_process_on_the_whole(world_size):
    """torch's SyncBatchNorm, which has no CPU form, is BatchNorm2d on the whole batch; so are we."""
    results = run_workers(run_share, world_size, SPECS_OVER_ALL, SHARES[world_size])
    for name, spec in SPECS_OVER_ALL.items():
        assert_whole([result[name] for result in results], run_whole(spec, SHARES[world_size]))
    rows = [result["plain"] for result in results]
    torchs = randomize(nn.BatchNorm2d(NUM_CHANNELS).double())
    for step in range(STEPS):
        whole = torch.cat([to_row(draw(rank, step, share)[0]) for rank, share in enumerate(SHARES[world_size])])
        outputs = torch.cat([to_row(row[0][step][0]) for row in rows])
        torch.testing.assert_close(outputs, torchs(whole), **EXACT)
    torch.testing.assert_close(rows[0][2], dict(torchs.state_dict()), **EXACT)


def run_groups(rank, spec, shares, nodes):
    with mock.patch.object(socket, "gethostname", return_value=nodes[rank]):
        return run_share(rank, {"norm": spec}, shares)["norm"]


@pytest.mark.parametrize(
    ("workers", "nodes", "groups"),
    [
        ("node", "aab", [(0, 1), (2,)]),
        ("node", "aba", [(0, 2), (1,)]),
        ("node", "abc", [(0,), (1,), (2,)]),
        ("node", "aaa", [(0, 1, 2)]),
        ("one", "aaa", [(0,), (1,), (2,)]),
        (1, "aaa", [(0,), (1,), (2,)]),
        (3, "abc", [(0, 1, 2)]),
    ],
)
def test_groups_of_workers_are_processes_of_their_own(workers, nodes, groups):
    shares = [(2, 4, 4), (1, 2, 3), (3, 1, 5)]
    results = run_workers(run_groups, 3, NormSpec(workers=workers), shares, nodes)
    for members in groups:
        norm = build(NormSpec())
        batches = []
        for step in range(STEPS):
            parts = [draw(rank, step, shares[rank]) for rank in members]
            batches.append((*(torch.cat([to_row(part[kind]) for part in parts]) for kind in (0, 1)), []))
        assert_whole([results[rank] for rank in members], run_steps(norm, batches))


def refuse_workers(rank, workers, kind):
    with pytest.raises(ConfigError) as error:
        kind(NUM_CHANNELS, *([LEVELS] if kind is LevelBatchNorm2d else []), NormSpec(workers=workers))
    dist.barrier()  # nobody hangs, everybody was told
    return str(error.value)


@pytest.mark.parametrize("kind", [BatchNorm2d, LevelBatchNorm2d])
@pytest.mark.parametrize(("world_size", "workers", "divisors"), [(3, 2, "1, 3"), (2, 3, "1, 2"), (3, 6, "1, 3")])
def test_a_number_that_does_not_divide_the_workers_is_refused_by_all(kind, world_size, workers, divisors):
    messages = run_workers(refuse_workers, world_size, workers, kind, timeout=20)
    assert set(messages) == {
        f"workers must divide the number of all workers, {world_size}; got {workers} (NormSpec). Use one of {divisors}."
    }


def count_collectives(rank, specs):
    counts = {}
    for name, spec in specs.items():
        x, grad, names = draw(rank, 0, SHARES[3][rank])
        if spec.has_levels:
            norm, inputs = make_norm(spec).train(), make_features(seed=rank)
            inputs = {level: feature.requires_grad_() for level, feature in inputs.items()}
        else:
            norm, inputs = build(spec), x.requires_grad_()
        with NotedCollectives() as forward, use_domain(names or DOMAINS[0]):
            outputs = norm(inputs)
        with NotedCollectives() as backward:
            (sum(y.sum() for y in outputs.values()) if isinstance(outputs, dict) else (outputs * grad).sum()).backward()
        with NotedCollectives() as evaluation, use_domain(names or DOMAINS[0]):
            norm.eval()(inputs)
        counts[name] = forward.names, backward.names, evaluation.names
    return counts


def test_one_collective_forward_and_one_backward_whatever_is_normalized():
    levels = {param.id: param.values[0].replace(workers="all") for param in SPECS}
    specs = {**SPECS_OVER_ALL, **levels, "frozen": NormSpec(workers="all", frozen="statistics")}
    specs["by_batch"] = NormSpec(workers="all", inference="mini_batch")  # at inference of this worker alone
    specs["domains_by_batch"] = DOMAIN_SPEC.replace(workers="all", inference="mini_batch")
    specs["one"] = NormSpec()
    specs = {name: spec for name, spec in specs.items() if not spec.has_levels or name in levels}
    for counts in run_workers(count_collectives, 3, specs):
        for name, (forward, backward, evaluation) in counts.items():
            if name in ("frozen", "one"):
                assert (forward, backward) == ([], []), name
            elif name == "by_population":  # normalized by constants: only the statistics are exchanged
                assert (forward, backward) == (["allgather_"], []), name
            else:
                assert (forward, backward) == (["allgather_"], ["allreduce_"]), name
            assert evaluation == [], name


def single_elements(rank, workers, shares, choice):
    """What worker `rank` meets with so many samples of a single position; "error" or its outputs."""
    norm = build(NormSpec(workers=workers, single_element=choice))
    norm.path = "roi_heads.norm"
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.full((shares[rank], NUM_CHANNELS, 1, 1), 3.0, dtype=torch.float64)
    try:
        output = norm(x)
    except StatisticsError as error:
        return str(error)
    unmoved = all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    norm.load_state_dict(before)
    return unmoved, torch.allclose(output, norm.eval()(x))


def meet_a_lonely_domain(rank):
    """Worker 0 has the only element of its domain; the other has many of another."""
    norm = build(DOMAIN_SPEC.replace(workers="all"))
    x = torch.ones(1, NUM_CHANNELS, 1, 1).double() if rank == 0 else draw(rank, 0, (2, 4, 4))[0]
    try:
        with use_domain(DOMAINS[rank]):
            norm(x)
    except StatisticsError as error:
        return str(error)
    return "nothing"


def test_a_domain_of_one_element_is_refused_also_by_workers_without_that_domain():
    messages = run_workers(meet_a_lonely_domain, 2, timeout=20)
    assert all("got 1 (BatchNorm2d, day)" in message for message in messages)


def leave_levels_out(rank, spec):
    """Worker 1 has one of three levels."""
    norm, filled, features = make_norm(spec).train(), make_norm(spec).train(), make_features(seed=rank)
    given = {level: features[level] for level in (LEVELS[1:2] if rank else LEVELS)}
    outputs = norm(given)
    expected = filled({level: x if level in given else x[:0] for level, x in features.items()})
    return outputs, {level: expected[level] for level in given}, dict(norm.state_dict()), dict(filled.state_dict())


@pytest.mark.parametrize("row", [1, 4])
def test_a_level_that_one_worker_leaves_out_is_as_if_it_were_empty(row):
    spec = NormSpec.from_table5_row(row, workers="all")
    for outputs, expected, state, right in run_workers(leave_levels_out, 2, spec, timeout=20):
        torch.testing.assert_close(outputs, expected, **EXACT)
        torch.testing.assert_close(state, right, **EXACT)


@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 0, 1)])
def test_one_element_over_all_workers(shares):
    refused = run_workers(single_elements, 3, "all", shares, "error", timeout=20)
    assert all("more than 1 element per channel in training; got 1 (roi_heads.norm)" in text for text in refused)
    assert run_workers(single_elements, 3, "all", shares, "population", timeout=20) == [(True, True)] * 3


def test_one_element_per_worker_is_a_mini_batch_where_workers_share_it():
    results = run_workers(single_elements, 2, "all", (1, 1), "error", timeout=20)
    assert [unmoved for unmoved, _ in results] == [False, False]
    alone = run_workers(single_elements, 2, "one", (1, 2), "error", timeout=20)
    assert "got 1 (roi_heads.norm)" in alone[0]
    assert alone[1][0] is False


def train_domain_after_domain(rank):
    """Batches of one domain each, as a data set at a time gives; every affine has to take part."""
    own = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
    norm = BatchNorm2d(NUM_CHANNELS, NormSpec(domains=("day", "night"), **own))
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, NUM_CHANNELS, 1), norm))
    for step in range(4):
        with use_domain(("day", "night")[step % 2]):
            model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    return [parameter.grad for parameter in norm.parameters()]


def test_domains_take_turns_in_data_parallel_training():
    first, second = run_workers(train_domain_after_domain, 2, timeout=30)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""A head dealt over workers: three forms of shuffle BN are one, what they send, and that all workers agree."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bnext.distributed import all_reduce_sum, resolve_group
from bnext.errors import BNextError
from bnext.functional import deal_samples
from bnext.layers import BatchNorm2d, NormSpec, Shuffled, deal_statistics
from bnext.layers.deal import draw_seed
from bnext.scope import use_domain
from bnext.surgery import convert_norm
from tests import reference
from tests.cases import randomize
from tests.collectives import NotedCollectives
from tests.record import note_groups
from tests.workers import run_workers

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SIDE = 3
SHARES = [(6,), (5, 7), (6, 0), (4, 4, 4), (5, 0, 3), (1, 0, 0), (9, 2, 0)]


def make_head(make_norm=nn.BatchNorm2d):
    """Four batch norms, a convolution before each."""
    channels = (3, 4, 5, 4, 6)
    layers = []
    for i, o in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), make_norm(o), nn.ReLU()]
    return randomize(nn.Sequential(*layers[:-1]).double()).train()


def make_own_head(**answers):
    return make_head(lambda channels: BatchNorm2d(channels, NormSpec(**answers)))


def draw(rank, num_samples, step=0):
    """Features of the samples of a worker, and the gradient of its loss with respect to their outputs."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    features = torch.randn(num_samples, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * (rank + 1) + rank
    return features, torch.randn(num_samples, 6, SIDE, SIDE, generator=generator, dtype=torch.float64)


def run_step(head, rank, num_samples, step=0):
    """Output, input gradient, this worker's parameter gradients."""
    features, factors = draw(rank, num_samples, step)
    features.requires_grad_()
    head.zero_grad()
    output = head(features)
    output.backward(factors)
    return output.detach(), features.grad, [p.grad for p in head.parameters()]


def norms_of(module):
    return [part for part in module.modules() if isinstance(part, BatchNorm2d)]


def deal_of(shares, num_groups, seed):
    """What workers deal whose first one starts at a seed."""
    torch.manual_seed(seed)
    return deal_samples(shares, num_groups, draw_seed())


# ---- equality


def run_form(rank, cases):
    """For each case: what a step gives, and the groups of the last norm."""
    results = []
    for form, shares, num_groups in cases:
        head = make_own_head(workers="all" if form == "statistics" else "one")
        if form == "statistics":
            deal_statistics(head, num_groups)
        noted = note_groups(head)
        torch.manual_seed(7 if rank == 0 else 1000 + rank)  # generators of workers differ
        result = run_step(head if form == "statistics" else Shuffled(head), rank, shares[rank])
        results.append((*result, noted[norms_of(head)[-1]]))
    return results


def run_reference(shares, deals, num_groups):
    """The whole in one process, with torch's batch norms."""
    head = make_head()
    pairs = [draw(rank, share) for rank, share in enumerate(shares)]
    features = [own.requires_grad_() for own, _ in pairs]
    outputs = reference.shuffled_by_gathering(head, features, deals, num_groups)
    gradients = torch.autograd.grad(outputs, [*features, *head.parameters()], [factors for _, factors in pairs])
    return [output.detach() for output in outputs], gradients[: len(shares)], gradients[len(shares) :]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dealt_statistics_and_moved_features_are_gathering_and_permuting(world_size):
    every = [shares for shares in SHARES if len(shares) == world_size]
    cases = [("features", shares, world_size) for shares in every]  # one group per worker
    cases += [("statistics", shares, None if world_size > 1 else 2) for shares in every]
    cases += [("statistics", shares, groups) for shares in every for groups in (2, 5, 13)]  # fewer, more, too many
    results = run_workers(run_form, world_size, cases)
    for (form, shares, num_groups), of_workers in zip(cases, zip(*results, strict=True), strict=True):
        number = num_groups or world_size
        deals = deal_of(shares, number, 7)
        outputs, of_features, of_parameters = run_reference(shares, deals, number)
        for rank in range(world_size):
            torch.testing.assert_close(of_workers[rank][0], outputs[rank], **EXACT)
            torch.testing.assert_close(of_workers[rank][1], of_features[rank], **EXACT)
            if form == "statistics":
                assert torch.equal(of_workers[rank][3].numbers, deals[rank])
        totals = [sum(gradients) for gradients in zip(*(own[2] for own in of_workers), strict=True)]
        torch.testing.assert_close(totals, list(of_parameters), **EXACT)


def run_running_statistics(rank, shares):
    heads = [make_own_head(workers="all", average=average) for average in ("moving", "cumulative") for _ in range(2)]
    for head in heads[::2]:
        deal_statistics(head, 4)
    for step in range(3):
        for dealt, whole in zip(heads[::2], heads[1::2], strict=True):
            # The first norm sees the same features in both; later ones see other activations.
            dealt(draw(rank, shares[rank], step)[0])
            whole(draw(rank, shares[rank], step)[0])
    return [dict(norms_of(head)[0].state_dict()) for head in heads]


def test_running_statistics_take_in_all_groups_at_once_as_a_sync_bn_does():
    of_workers = run_workers(run_running_statistics, 2, (5, 3))
    for dealt, whole in ((0, 1), (2, 3)):
        torch.testing.assert_close(of_workers[0][dealt], of_workers[0][whole], **EXACT)
        assert int(of_workers[0][dealt]["num_batches_tracked"]) == 10  # of 7 as made
        for key, value in of_workers[0][dealt].items():
            assert torch.equal(of_workers[1][dealt][key], value), "workers differ"


DOMAINS = ("day", "night")
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS, workers="all")
SPECS = {
    "renorm": NormSpec(workers="all", training="renorm"),
    "domains": OWN,
    "domains_one_batch": OWN.replace(statistics="shared"),
    "domains_renorm": OWN.replace(training="renorm"),
    "no_affine": NormSpec(workers="all", affine="none"),
    "cumulative": NormSpec(workers="all", average="cumulative"),
}


def run_specs(rank, shares):
    """The shares of all workers, or the whole by one worker with the same seed and groups."""
    results = {}
    for name, spec in SPECS.items():
        norm = randomize(BatchNorm2d(3, spec).double()).train()
        deal_statistics(norm, 3)
        torch.manual_seed(3)
        own = shares[rank]
        features = torch.cat([draw(seed, count)[0] for seed, count in own]).requires_grad_()
        domains = [DOMAINS[(seed + i) % 2] for seed, count in own for i in range(count)]
        with use_domain(domains or DOMAINS[0]):
            output = norm(features)
        output.pow(3).sum().backward()
        results[name] = (output.detach(), features.grad, [p.grad for p in norm.parameters()], dict(norm.state_dict()))
    return results


def test_every_kind_of_norm_is_dealt_over_workers_as_in_one():
    parts = [(0, 5), (1, 0), (2, 4)]
    of_workers = run_workers(run_specs, 3, [[part] for part in parts])
    (whole,) = run_workers(run_specs, 1, [parts])
    for name, right in whole.items():
        own = [worker[name] for worker in of_workers]
        for kind in (0, 1):
            torch.testing.assert_close(torch.cat([worker[kind] for worker in own]), right[kind], **EXACT)
        totals = [sum(gradients) for gradients in zip(*(worker[2] for worker in own), strict=True)]
        torch.testing.assert_close(totals, right[2], **EXACT)
        for worker in own:
            torch.testing.assert_close(worker[3], right[3], **EXACT)


# ---- the deal


def run_deals(rank):
    """Groups of the norms of two heads over three steps; the generators of the workers differ."""
    torch.manual_seed(50 + rank)
    heads = [make_own_head(workers="all") for _ in range(2)]
    for head in heads:
        deal_statistics(head, 3)
    noted = [note_groups(head) for head in heads]
    found = []
    for step in range(3):
        for head, groups in zip(heads, noted, strict=True):
            head(draw(rank, 12, step)[0])
            numbers = [groups[norm].numbers for norm in norms_of(head)]
            assert all(torch.equal(own, numbers[0]) for own in numbers), "all norms of a head have the same deal"
            found.append(numbers[0].tolist())
    return found


def test_one_deal_per_head_and_step_which_all_workers_know():
    first, second = run_workers(run_deals, 2)
    assert (first, second) == tuple(run_workers(run_deals, 2)), "reproducible from the seed"
    whole = [(*a, *b) for a, b in zip(first, second, strict=True)]
    assert len(set(whole)) == len(whole), "heads and steps have different deals"
    for deal in whole:
        assert sorted(deal) == sorted([0, 1, 2] * 8), "even over workers: they have drawn the same"


# ---- what is sent


def run_bytes(rank, num_samples, channels, side, num_groups):
    features = torch.randn(num_samples, channels, side, side)
    found = []
    for form in ("statistics", "features"):
        spec = NormSpec(workers="all" if form == "statistics" else "one")
        head = nn.Sequential(*(BatchNorm2d(channels, spec) for _ in range(4)))
        if form == "statistics":
            deal_statistics(head, num_groups)
        called = head if form == "statistics" else Shuffled(head)
        for is_backward in (False, True):
            own = features.clone().requires_grad_()
            with NotedCollectives() as sent, torch.set_grad_enabled(is_backward):
                output = called(own)
                if is_backward:
                    output.sum().backward()
            found.append((len(sent.names), sent.num_bytes))
    return found


def test_dealt_statistics_send_moments_and_moved_features_send_features():
    num_samples, channels, side, num_groups = 48, 32, 7, 3
    for forward, both, moved, moved_both in run_workers(run_bytes, 2, num_samples, channels, side, num_groups):
        moments = 4 * (2 * channels + 1) * num_groups * 4  # 4 norms of float32
        assert forward == (5, moments + 40)  # and five numbers of 8 bytes for the deal
        assert both == (9, moments + 40 + 4 * 2 * channels * num_groups * 4)
        features = num_samples * channels * side**2 * 4
        assert (moved[0], moved_both[0]) == (3, 5)
        assert 2 * features <= moved[1] <= 2 * features + 40
        assert 4 * features <= moved_both[1] <= 4 * features + 40
        assert moved_both[1] / both[1] > 150


def run_frozen(rank):
    head = make_own_head(workers="all", frozen="statistics")
    deal_statistics(head, 2)
    with NotedCollectives() as sent:
        run_step(head, rank, 3)
    evaluated = make_own_head(workers="all")
    deal_statistics(evaluated, 2)
    evaluated.eval()
    with NotedCollectives() as sent_in_evaluation:
        run_step(evaluated, rank, 3)
    moved = Shuffled(make_own_head()).eval()
    with NotedCollectives() as moved_in_evaluation:
        run_step(moved, rank, 3)
    return [len(noted.names) for noted in (sent, sent_in_evaluation, moved_in_evaluation)]


def test_frozen_statistics_and_evaluation_send_nothing():
    assert run_workers(run_frozen, 2) == [[0, 0, 0]] * 2


# ---- groups of workers


def run_pairs(rank):
    """workers=k: the samples are dealt out among k workers."""
    head = make_own_head(workers=1)
    convert_norm(head, {"": NormSpec(workers="node")})
    deal_statistics(head)
    noted = note_groups(head)
    torch.manual_seed(0)
    run_step(head, rank, 4)
    groups = noted[norms_of(head)[0]]
    return groups.numbers.tolist(), groups.num_groups


def test_the_workers_of_the_norms_are_those_that_deal():
    results = run_workers(run_pairs, 2)
    deals = deal_of((4, 4), 2, 0)
    assert results == [(own.tolist(), 2) for own in deals]


def run_without_gradient(rank, form):
    """The pooler of a worker without RoIs gives an empty tensor that needs no gradient."""
    head = make_own_head(workers="all" if form == "statistics" else "one")
    if form == "statistics":
        deal_statistics(head)
    features, factors = draw(rank, 0 if rank else 5)
    features.requires_grad_(rank == 0)
    torch.manual_seed(7)
    output = (head if form == "statistics" else Shuffled(head))(features)
    output.backward(factors)
    group = resolve_group("all")
    return features.grad, [all_reduce_sum(p.grad, group) for p in head.parameters()]


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_a_worker_without_samples_whose_features_need_no_gradient(form):
    first, second = run_workers(run_without_gradient, 2, form, timeout=20)
    _, of_features, of_parameters = run_reference((5, 0), deal_of((5, 0), 2, 7), 2)
    torch.testing.assert_close(first[0], of_features[0], **EXACT)
    assert second[0] is None
    torch.testing.assert_close(first[1], list(of_parameters), **EXACT)


def run_without_parameters(rank, form):
    """A norm that nothing with a gradient comes before, on a worker without RoIs."""
    spec = NormSpec(affine="none", workers="all" if form == "statistics" else "one")
    head = nn.Sequential(BatchNorm2d(3, spec)).double()
    if form == "statistics":
        deal_statistics(head)
    features = draw(rank, 0 if rank else 4)[0].requires_grad_(rank == 0)
    output = (head if form == "statistics" else Shuffled(head))(features)
    output.pow(3).sum().backward()
    return features.grad


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_a_worker_without_anything_that_needs_a_gradient_takes_part_in_the_backward_pass(form):
    first, second = run_workers(run_without_parameters, 2, form, timeout=20)
    assert bool(first.any())
    assert second is None


def train_in_ddp(rank, form):
    head = make_own_head(workers="all" if form == "statistics" else "one")
    if form == "statistics":
        deal_statistics(head)
    # As detectron2 sets it up; buffers that differ would be sent from the first worker.
    model = DistributedDataParallel(head if form == "statistics" else Shuffled(head), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank or 7)
    for step in range(2):
        features, factors = draw(rank, (5, 0)[rank], step)
        optimizer.zero_grad()
        model(features).backward(2 * factors / 5)  # DDP takes the mean over two workers
        optimizer.step()
    return [p.detach() for p in head.parameters()]


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_distributed_data_parallel_trains_the_head_as_one_process_would(form):
    results = run_workers(train_in_ddp, 2, form)
    head = make_head()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    torch.manual_seed(7)
    for step in range(2):
        deals = deal_samples((5, 0), 2, draw_seed())
        pairs = [draw(rank, share, step) for rank, share in enumerate((5, 0))]
        outputs = reference.shuffled_by_gathering(head, [own for own, _ in pairs], deals, 2)
        optimizer.zero_grad()
        torch.autograd.backward(outputs, [factors / 5 for _, factors in pairs])
        optimizer.step()
    for of_worker in results:
        torch.testing.assert_close(of_worker, [p.detach() for p in head.parameters()], **EXACT)


# ---- a worker without RoIs, whose features are new zeros


class Detached(nn.Module):
    """A head that begins in place; a worker without samples gets features that need no gradient, as a pooler's."""

    def __init__(self, form, inplace):
        super().__init__()
        spec = NormSpec(workers="all" if form == "statistics" else "one")
        body = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(3, 4, 3, bias=False), BatchNorm2d(4, spec))
        self.head = randomize(body.double())
        if form == "statistics":
            deal_statistics(self.head)
        self.called = self.head if form == "statistics" else Shuffled(self.head)
        self.stem = nn.Conv2d(3, 3, 1).double()

    def forward(self, images, use_reentrant=None):
        features = self.stem(images) if len(images) else images
        if use_reentrant is None:
            return self.called(features)
        return checkpoint(self.called, features, use_reentrant=use_reentrant)


def run_detached(rank, form, use_reentrant):
    torch.manual_seed(0)
    model = Detached(form, inplace=use_reentrant is None)  # torch checkpoints nothing whose input is changed
    output = model(draw(rank, (5, 0)[rank])[0], use_reentrant)
    output.pow(3).sum().backward()
    gradients = [p.grad for p in model.head.parameters()]
    return [all_reduce_sum(g, resolve_group("all")) for g in gradients]


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_a_head_that_begins_in_place_and_a_worker_without_samples(form):
    plain, recomputed = (run_workers(run_detached, 2, form, way) for way in (None, False))
    for own in (*plain, *recomputed):
        torch.testing.assert_close(own, plain[0], **EXACT)


def run_until_it_is_refused(rank, form):
    try:
        run_detached(rank, form, True)
    except BNextError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_reentrant_checkpointing_is_refused_where_a_worker_would_have_no_backward_pass(form):
    answers = run_workers(run_until_it_is_refused, 2, form)
    assert all(kind == "StatisticsError" and "Set use_reentrant=False" in text for kind, text in answers)

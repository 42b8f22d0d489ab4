"""`Shuffled`: features move and come back; alone and in evaluation it is its module; what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext.errors import BNextError, ConfigError, StatisticsError
from bnext.functional import deal_samples
from bnext.layers import Shuffled, shuffle_features
from bnext.layers.deal import draw_seed
from tests import reference
from tests.cases import randomize
from tests.workers import run_workers

EXACT = {"rtol": 1e-11, "atol": 1e-11}


class Coupled(nn.Module):
    """A head whose samples meet otherwise than in a batch norm: each is compared with the mean of all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x)
        x = x - x.mean(0, keepdim=True) if len(x) else x
        return self.fc(x.flatten(1))  # [N, 4, 2, 2] -> [N, 5]: another rank than the input


def build():
    return randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Coupled()).double()).train()


def draw(rank, num_samples, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(num_samples, 3, 4, 4, generator=generator, dtype=torch.float64) + rank
    return features.to(dtype), torch.randn(num_samples, 5, generator=generator, dtype=torch.float64).to(dtype)


def run(module, rank, num_samples, seed=7):
    features, factors = draw(rank, num_samples)
    features.requires_grad_()
    torch.manual_seed(seed)
    output = module(features)
    output.backward(factors)
    return output.detach(), features.grad, [p.grad for p in module.parameters()]


# ---- alone


def test_alone_it_is_its_module():
    moved, plain = Shuffled(build()), build()
    state = torch.get_rng_state()
    torch.testing.assert_close(run(moved, 0, 5), run(plain, 0, 5), rtol=0, atol=0)
    torch.set_rng_state(state)
    moved(draw(0, 5)[0])
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert list(moved.state_dict()) == [f"module.{key}" for key in plain.state_dict()]


@pytest.mark.parametrize("workers", ["some", 0, True, None, -2])
def test_workers_that_are_none(workers):
    with pytest.raises(ConfigError, match=r"workers must be one of 'one', 'node', 'all', or a number"):
        Shuffled(build(), workers)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(way):
    moved = Shuffled(build(), where="roi_heads.mask_head")
    twin = way(moved)
    assert (twin.workers, twin.where) == ("all", "roi_heads.mask_head")
    torch.testing.assert_close(run(twin, 0, 5), run(moved, 0, 5), rtol=0, atol=0)


# ---- over workers


def run_forms(rank, shares):
    """Plain, checkpointed in both ways, a copy, evaluation."""
    found = []
    forms = (
        lambda moved: moved,
        lambda moved: lambda x: checkpoint(moved, x, use_reentrant=True),
        lambda moved: lambda x: checkpoint(moved, x, use_reentrant=False),
    )
    for form in forms:
        moved = Shuffled(build())
        features, factors = draw(rank, shares[rank])
        features.requires_grad_()
        torch.manual_seed(7 + rank)
        output = form(moved)(features)
        torch.manual_seed(99)  # what is computed again has the generator as it was
        output.backward(factors)
        found.append((output.detach(), features.grad, [p.grad for p in moved.parameters()]))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(Shuffled(build()))))
    found.append(run(twin, rank, shares[rank], 7 + rank))
    moved, plain = Shuffled(build()).eval(), build().eval()
    torch.testing.assert_close(run(moved, rank, shares[rank]), run(plain, rank, shares[rank]), rtol=0, atol=0)
    return found


@pytest.mark.parametrize("shares", [(5, 7), (3, 0, 1), (2, 0, 0)])
def test_modules_that_couple_samples_see_random_ones_of_all_workers(shares):
    results = run_workers(run_forms, len(shares), shares)
    torch.manual_seed(7)
    deals = deal_samples(shares, len(shares), draw_seed())
    pairs = [draw(rank, share) for rank, share in enumerate(shares)]
    features, plain = [own.requires_grad_() for own, _ in pairs], build()
    outputs = reference.shuffled_by_gathering(plain, features, deals, len(shares))
    gradients = torch.autograd.grad(outputs, [*features, *plain.parameters()], [factors for _, factors in pairs])
    for form in range(4):
        own = [worker[form] for worker in results]
        for rank in range(len(shares)):
            torch.testing.assert_close(own[rank][0], outputs[rank], **EXACT)
            torch.testing.assert_close(own[rank][1], gradients[rank], **EXACT)
        totals = [sum(parts) for parts in zip(*(worker[2] for worker in own), strict=True)]
        torch.testing.assert_close(totals, list(gradients[len(shares) :]), **EXACT)


def run_half(rank, dtype):
    features, factors = draw(rank, 4 + rank, torch.float32)
    results = []
    for is_half in (False, True):
        moved = Shuffled(build().float())
        own = features.clone().requires_grad_()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=is_half):
            output = moved(own)
        output.float().backward(factors)
        results.append([output.detach().float(), own.grad, moved.module[0].weight.grad])
    torch.testing.assert_close(results[1], results[0], rtol=0.1, atol=0.3)
    return str(output.dtype)


def test_half_types():
    for dtype in (torch.bfloat16, torch.float16):
        assert run_workers(run_half, 2, dtype) == [str(dtype)] * 2


def run_frozen_inputs(rank):
    """No worker's features need a gradient; parameters do."""
    moved = Shuffled(build())
    output = moved(draw(rank, 3)[0])
    output.sum().backward()
    with torch.no_grad():
        moved(draw(rank, 3)[0])
    return all(p.grad is not None for p in moved.parameters())


def test_features_that_need_no_gradient():
    assert run_workers(run_frozen_inputs, 2, timeout=20) == [True, True]


def refuse(rank, kind):
    features = draw(rank, 4)[0]
    if kind == "shape" and rank:
        features = features[:, :, :3]
    functions = {"tuple": lambda x: (x, x), "rows": lambda x: x[:-1], "scalar": lambda x: x.sum(), "shape": lambda x: x}
    module = nn.Identity().train()
    try:
        shuffle_features(module, functions[kind], features, "all", "roi_heads.box_head")
    except BNextError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("tuple", "must return a tensor with one row per sample; got tuple for 4 samples (roi_heads.box_head). "),
        ("rows", "one row per sample; got [3, 3, 4, 4] for 4 samples (roi_heads.box_head). Shuffle the part"),
        ("scalar", "one row per sample; got [] for 4 samples (roi_heads.box_head). Shuffle the part"),
        ("shape", "the same shape on all workers; got [3, {}, 4] on worker {}, and [48, 36] numbers per sample on all"),
    ],
)
def test_what_cannot_be_shuffled(kind, text):
    for rank, (error, message) in enumerate(run_workers(refuse, 2, kind, timeout=20)):
        assert error is StatisticsError
        assert text.format(4 - rank, rank) in message


# ---- second derivatives, frozen norms, one worker


def run_penalty(rank):
    """A penalty on the gradient: through the shuffle its gradient is that of the module on all samples."""
    module = randomize(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Softplus()).double())
    features = draw(rank, 4)[0].requires_grad_()
    output = Shuffled(module)(features) + features.mean() ** 3
    (gradient,) = torch.autograd.grad(output.pow(2).sum(), features, create_graph=True)
    gradient.pow(2).sum().backward()
    return features.detach(), [p.grad for p in module.parameters()]


def test_a_penalty_on_the_gradient():
    workers = run_workers(run_penalty, 2)
    right = [torch.zeros_like(g) for g in workers[0][1]]
    for features, _ in workers:
        module = randomize(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Softplus()).double())
        own = features.clone().requires_grad_()
        output = module(own) + own.mean() ** 3
        (gradient,) = torch.autograd.grad(output.pow(2).sum(), own, create_graph=True)
        gradient.pow(2).sum().backward()
        right = [a + p.grad for a, p in zip(right, module.parameters(), strict=True)]
    found = [sum(parts) for parts in zip(*(gradients for _, gradients in workers), strict=True)]
    torch.testing.assert_close(found, right, **EXACT)


def run_with_frozen_norms(rank):
    module = build()
    module[1].eval()
    with torch.no_grad():
        return Shuffled(module)(draw(rank, 3)[0]), module(draw(rank, 3)[0])


def test_norms_that_are_frozen_in_evaluation_mode_do_not_keep_samples_at_home():
    for shuffled, at_home in run_workers(run_with_frozen_norms, 2):
        assert not torch.allclose(shuffled, at_home)


def test_one_worker_is_told(caplog):
    Shuffled(build(), where="box_head")
    assert "Samples are not shuffled (box_head)" in caplog.text

"""Activations that are computed again have the record of their own forward, or are refused; never another's.

Every program here runs twice, without activation checkpointing and with it, and must give the same gradients and
buffers.
"""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext import BatchNorm2d, NormSpec, StatisticsError, deal_statistics, use_domain, use_groups, virtual_samples
from tests.cases import randomize
from tests.record import assert_nothing_is_open

OWN = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
KINDS = {"reentrant": {"use_reentrant": True}, "without reentrance": {"use_reentrant": False}}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(domains=("day", "night"), **answers):
    spec = NormSpec(domains=domains, **OWN, **answers) if domains else NormSpec(**answers)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, spec), nn.ReLU(), nn.Conv2d(4, 3, 1), BatchNorm2d(3, spec))
    return randomize(model.double()).train()


def draw(seed=0, number=4):
    """Samples that differ, so that groups do."""
    x = torch.randn(number, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    numbers = torch.arange(number).view(-1, 1, 1, 1)
    return (x * (1 + numbers) + numbers).requires_grad_()


def loss_of(domain, run, model, x):
    with use_domain(domain):
        return run(model, x).pow(3).sum()


def two_domains(run):
    model, a, b = build(), draw(0), draw(1)
    (loss_of("day", run, model, a) + 2 * loss_of("night", run, model, b)).backward()
    return model, a, b


def pipeline(run):
    """Two forwards of a domain, one backward pass, a forward of another domain, the other backward pass."""
    model, a, b, c = build(), draw(0), draw(1), draw(2)
    first, second = loss_of("day", run, model, a), loss_of("day", run, model, b)
    first.backward()
    third = loss_of("night", run, model, c)
    second.backward()
    third.backward()
    return model, a, b, c


def set_modes_between(run):
    model, a, b, c = build(), draw(0), draw(1), draw(2)
    first = loss_of("day", run, model, a)
    loss_of("night", run, model.eval(), c)
    second = loss_of("night", run, model.train(), b)
    (first + second).backward()
    return model, a, b


def other_forwards_between(run):
    """Without gradients, without a backward pass, without checkpointing."""
    model, a, b = build(), draw(0), draw(1)
    loss = loss_of("day", run, model, a)
    with torch.no_grad():
        loss_of("night", run, model, b)
    loss_of("night", lambda function, x: function(x), model, b)
    loss.backward()
    return model, a


def frozen_norms(run):
    model, a, b = build(fallback_domain="night").eval(), draw(0), draw(1)
    (loss_of("day", run, model, a) + loss_of("night", run, model, b)).backward()
    return model, a, b


def groups(run):
    model, a, b, c = build(domains=()), draw(0), draw(1), draw(2)
    loss = run(model, a).pow(3).sum()
    for x, numbers in ((b, [0, 0, 1, 1]), (c, [0, 1, 1, 0])):
        with use_groups(model, numbers, 2):
            loss = loss + run(model, x).pow(3).sum()
    loss.backward()
    return model, a, b, c


def groups_at_inference(run):
    model, a, b = build(domains=(), inference="mini_batch").eval(), draw(0), draw(1)
    with use_groups(model, [0, 0, 1, 1], 2):
        loss = run(model, a).pow(3).sum()
    (loss + run(model, b).pow(3).sum()).backward()
    return model, a, b


def virtual(run):
    model, a, b = build(domains=()), draw(0), draw(1)
    with virtual_samples(model, draw(9, 6).detach()):
        loss = run(model, a).pow(3).sum()
    (loss + run(model, b).pow(3).sum()).backward()
    return model, a, b


def other_specs(run):
    model, a, b = build(domains=()), draw(0), draw(1)
    loss = run(model, a).pow(3).sum()
    for norm in (model[1], model[4]):
        norm.spec = norm.spec.replace(normalization_batch_size=2)
    (loss + run(model, b).pow(3).sum()).backward()
    return model, a, b


def domain_within(run):
    """One call in the domain around, one in a domain that the function names itself."""
    model, a = build(), draw(0)

    def call_twice(x):
        x = model(x)
        with use_domain("night"):
            return model(x)

    loss_of("day", run, call_twice, a).backward()
    return model, a


def nested(run):
    model, a, b = build(), draw(0), draw(1)
    (loss_of("day", run, lambda x: run(model, x), a) + loss_of("night", run, lambda x: run(model, x), b)).backward()
    return model, a, b


def two_backward_passes(run):
    """Of one graph, while another one waits."""
    model, a, b, c = build(), draw(0), draw(1), draw(2)
    waiting, loss = loss_of("day", run, model, a), loss_of("day", run, model, b)
    loss.backward(retain_graph=True)
    loss.backward()
    other = loss_of("night", run, model, c)
    (waiting + other).backward()
    return model, a, b, c


def dealt(run):
    torch.manual_seed(3)
    model, a, b = build(domains=()), draw(0, 8), draw(1, 8)
    head = nn.Sequential(model)
    deal_statistics(head, 2)
    (head(a).pow(3).sum() + run(head, b).pow(3).sum()).backward()
    return model, a, b


def penalty(run):
    """The gradient of a gradient, after a forward of another domain."""
    model, a, b = build(), draw(0), draw(1)
    (gradient,) = torch.autograd.grad(loss_of("day", run, model, a), a, create_graph=True)
    loss_of("night", run, model, b)
    gradient.square().sum().backward()
    return model, a


PROGRAMS = [
    two_domains,
    pipeline,
    set_modes_between,
    other_forwards_between,
    frozen_norms,
    groups,
    groups_at_inference,
    virtual,
    other_specs,
    domain_within,
    nested,
    two_backward_passes,
    dealt,
]


def run_program(program, run):
    model, *inputs = program(run)
    gradients = [x.grad for x in inputs] + [parameter.grad for parameter in model.parameters()]
    return gradients, list(model.buffers())


def checkpointing(kind):
    return lambda function, x: checkpoint(function, x, **KINDS[kind])


def assert_same(program, run):
    for found, expected in zip(run_program(program, run), run_program(program, lambda f, x: f(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_nothing_is_open()


@kinds
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_recomputation_knows_what_its_own_forward_knew(program, kind):
    assert_same(program, checkpointing(kind))


def test_a_recomputation_for_a_second_derivative():
    assert_same(penalty, checkpointing("without reentrance"))  # torch has none for the other


@kinds
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("around", [None, "day"])
def test_a_backward_pass_may_lie_anywhere(kind, thread, around):
    """In a scope of its own; in another thread, as on a GPU."""

    def program(run):
        model, a = build(), draw()
        loss = loss_of("night", run, model, a)

        def backward():
            with contextlib.nullcontext() if around is None else use_domain(around):
                loss.backward()

        call = threading.Thread(target=backward) if thread else None
        if call is None:
            backward()
        else:
            call.start()
            call.join()
        return model, a

    assert_same(program, checkpointing(kind))


@kinds
def test_a_model_is_gone_with_its_last_graph(kind):
    """Notes on a checkpoint name norms; they may keep them only as long as the graph."""
    model = build()
    norm = weakref.ref(model[1])
    loss_of("day", checkpointing(kind), model, draw()).backward()
    del model
    gc.collect()
    assert norm() is None


def test_a_function_that_calls_a_norm_more_often_when_it_is_computed_again():
    model, numbers = build(domains=()), iter((1, 2))

    def call(x):
        for _ in range(next(numbers)):
            x = model(x)
        return x

    output = checkpoint(call, draw(), use_reentrant=True)  # the other kind stops where the forward ended
    with pytest.raises(StatisticsError, match="a function that is computed again"):
        output.sum().backward()


class ForeignCheckpoint(torch.autograd.Function):
    """Somebody else's activation checkpointing."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(gradient)
        return None, x.grad


@pytest.mark.parametrize("lost", [two_domains, groups, virtual], ids=lambda program: program.__name__)
def test_somebody_elses_checkpointing_that_would_lose_a_scope_is_refused(lost):
    with pytest.raises(StatisticsError, match=r"activation checkpointing .*within the function"):
        lost(ForeignCheckpoint.apply)


def test_somebody_elses_checkpointing_that_loses_nothing():
    def plain(run):
        model, a, b = build(domains=()), draw(0), draw(1)
        with use_domain("day"):  # of no concern to norms without domains
            loss = run(model, a).pow(3).sum()
        (loss + run(model, b).pow(3).sum()).backward()
        return model, a, b

    def within(run):
        model, a = build(), draw()

        def call(x):
            with use_domain("night"):
                return model(x)

        run(call, a).pow(3).sum().backward()
        return model, a

    assert_same(plain, ForeignCheckpoint.apply)
    assert_same(within, ForeignCheckpoint.apply)

"""Activations that are computed again have the record of their own forward, or are refused; never another's."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext import BatchNorm2d, NormSpec, StatisticsError, carrying_record, use_domain, use_groups, virtual_samples
from bnext.scope.model import restoring
from tests.cases import randomize
from tests.record import assert_nothing_is_open

OWN = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
KINDS = {
    "reentrant": {"use_reentrant": True},
    "without reentrance": {"use_reentrant": False},
    "carried": {"use_reentrant": False, "context_fn": carrying_record},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(domains=("day", "night")):
    spec = NormSpec(domains=domains, **OWN) if domains else NormSpec()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, spec), nn.ReLU(), nn.Conv2d(4, 4, 1), BatchNorm2d(4, spec))
    return randomize(model.double()).train()


def draw(seed=0, number=4):
    return torch.randn(number, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(model, x, kind=None):
    x = x.requires_grad_()
    return model(x) if kind is None else checkpoint(model, x, **KINDS[kind])


def gradients(model, outputs):
    """Of all parameters, by one backward pass."""
    model.zero_grad()
    sum((index + 1) * output.pow(3).sum() for index, output in enumerate(outputs)).backward()
    return [parameter.grad for parameter in model.parameters()]


def in_thread(function):
    """A GPU's backward pass runs in a thread of autograd's own."""
    results = []

    def call():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results[0]


@kinds
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("around", [None, "day"])
def test_a_backward_pass_is_of_the_domain_of_its_forward_wherever_it_lies(kind, thread, around):
    results = []
    for form in (None, kind):
        model = build()
        with use_domain("night"):
            output = run(model, draw(), form)

        def backward(model=model, output=output):
            with contextlib.nullcontext() if around is None else use_domain(around):
                return gradients(model, [output])

        results.append(in_thread(backward) if thread else backward())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert_nothing_is_open()


@kinds
def test_two_domains_before_one_backward_pass_are_told_apart_or_refused(kind):
    results = []
    for form in (None, kind):
        model, outputs = build(), []
        for seed, domain in enumerate(("day", "night")):
            with use_domain(domain):
                outputs.append(run(model, draw(seed), form))

        if form in (None, "carried"):
            results.append(gradients(model, outputs))
            continue
        with pytest.raises(StatisticsError, match=r"activation checkpointing .*different domains.*carrying_record"):
            gradients(model, outputs)
    if kind == "carried":
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert_nothing_is_open()


@kinds
def test_steps_of_different_domains_one_after_another(kind):
    model, plain = build(), build()
    for seed, domain in enumerate(("day", "night", "night", "day")):
        with use_domain(domain):
            output, expected = run(model, draw(seed), kind), run(plain, draw(seed))
        torch.testing.assert_close(gradients(model, [output]), gradients(plain, [expected]), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@kinds
def test_a_forward_that_waits_for_a_later_backward_pass_is_not_mistaken(kind):
    """As in a pipeline: two forwards of a domain, one backward pass, a forward of another domain."""
    model = build()
    with use_domain("day"):
        first, second = run(model, draw(0), kind), run(model, draw(1), kind)
    gradients(model, [first])
    with use_domain("night"):
        run(model, draw(2), kind)

    if kind == "carried":
        gradients(model, [second])
        return
    with pytest.raises(StatisticsError, match="different domains"):
        gradients(model, [second])


@kinds
@pytest.mark.parametrize("scope", ["groups", "virtual"])
def test_groups_and_virtual_samples_of_the_forward(kind, scope):
    results = []
    for form in (None, kind):
        model, samples = build(domains=()), draw(9, 6)
        if scope == "groups":
            with use_groups(model, [0, 0, 1, 1], 2):
                output = run(model, draw(), form)
        else:
            with virtual_samples(model, samples):
                output = run(model, draw(), form)
        results.append(gradients(model, [output]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@kinds
def test_a_plain_forward_beside_one_with_groups(kind):
    model = build(domains=())
    plain = run(model, draw(0), kind)
    with use_groups(model, [0, 0, 1, 1], 2):
        grouped = run(model, draw(1), kind)
    if kind == "carried":
        gradients(model, [plain, grouped])
        return
    with pytest.raises(StatisticsError, match="different groups"):
        gradients(model, [plain, grouped])


@kinds
def test_a_domain_that_the_function_names_itself(kind):
    """Whatever else waits for a backward pass."""
    results = []
    for form in (None, kind):
        model, outputs = build(), []
        for seed, domain in enumerate(("day", "night")):

            def call(x, model=model, domain=domain):
                with use_domain(domain):
                    return model(x)

            x = draw(seed).requires_grad_()
            outputs.append(call(x) if form is None else checkpoint(call, x, **KINDS[form]))
        results.append(gradients(model, outputs))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@kinds
def test_forwards_without_a_backward_pass_do_not_count(kind):
    model = build()
    with restoring(model), torch.no_grad(), use_domain("night"):
        model(draw())  # as a re-estimation or a validation loss
    with torch.no_grad(), use_domain("night"):
        model.eval()(draw())
    model.train()

    with use_domain("day"):
        output = run(model, draw(), kind)
    gradients(model, [output])

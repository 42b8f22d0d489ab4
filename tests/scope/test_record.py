"""Scopes that overlap, stand around a `yield`, or in which a model is copied leave nothing behind."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from bnext import BatchNorm2d, NormSpec, deal_statistics, frozen_statistics, use_domain, use_groups
from bnext.scope import CallRecord, Scope, get_record
from bnext.scope.domain import get_active_domain
from bnext.scope.statistics import answering
from tests.record import assert_nothing_is_open


def generate(domain, seen):
    with use_domain(domain):
        for _ in range(2):
            yield
            seen.append((domain, get_active_domain()))


def test_two_generators_each_have_their_own_domain_and_leave_none():
    seen = []
    first, second = generate("day", seen), generate("night", seen)
    next(first), next(second)
    next(first), next(second)
    assert seen == [("day", "day"), ("night", "night")]

    with use_domain("fog"):  # around the consumer alone
        assert next(first, None) is None
    assert seen[-1] == ("day", "day")
    assert get_active_domain() == "night"
    second.close()
    assert_nothing_is_open()


def test_a_context_manager_around_a_scope_is_seen_by_its_body():
    @contextlib.contextmanager
    def at(domain):
        with use_domain(domain):
            yield

    with at("day"), at("night"):
        assert get_active_domain() == "night"
        with at("fog"):
            assert get_active_domain() == "fog"
        assert get_active_domain() == "night"
    assert_nothing_is_open()


class At:
    """A scope of somebody's own around ours."""

    def __init__(self, domain):
        self.stack, self.domain = contextlib.ExitStack(), domain

    def __enter__(self):
        self.stack.enter_context(use_domain(self.domain))

    def __exit__(self, *error):
        self.stack.close()


@contextlib.contextmanager
def at(domain):
    with use_domain(domain):
        yield


@pytest.mark.parametrize("scope", [use_domain, at, At])
@pytest.mark.parametrize("around", [False, True])
def test_generators_that_open_a_scope_by_helpers_of_their_own(scope, around):
    def step(domain):
        with scope(domain):
            for _ in range(3):
                yield get_active_domain()

    with use_domain("fog") if around else contextlib.nullcontext():
        generators = [step("day"), step("night")]
        assert [[next(generator) for generator in generators] for _ in range(3)] == [["day", "night"]] * 3
        assert [next(generator, None) for generator in generators] == [None, None]
    assert_nothing_is_open()


def test_coroutines_each_have_their_own_domain():
    class Pause:
        def __await__(self):
            yield

    async def step(domain, seen):
        with use_domain(domain):
            for _ in range(2):
                await Pause()
                seen.append(get_active_domain() == domain)

    seen = []
    coroutines = [step("day", seen), step("night", seen)]
    for _ in range(2):
        for coroutine in coroutines:
            coroutine.send(None)
    for coroutine in coroutines:
        with pytest.raises(StopIteration):
            coroutine.send(None)
    assert seen == [True] * 4
    assert_nothing_is_open()


class Interrupted(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


def test_the_scope_of_a_call_that_was_interrupted_is_over():
    """Torch runs no hook after a KeyboardInterrupt."""
    norm = BatchNorm2d(3)
    head = nn.Sequential(norm, Interrupted()).train()
    deal = deal_statistics(head, 2)
    with pytest.raises(KeyboardInterrupt):
        head(torch.randn(4, 3, 2, 2))
    assert_nothing_is_open()

    deal.remove()
    x = torch.randn(6, 3, 2, 2)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3)(x))


def test_a_dealt_module_that_calls_itself_goes_on_in_its_own_deal():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.is_inner, self.seen = BatchNorm2d(3), False, []

        def forward(self, x):
            if not self.is_inner:
                self.is_inner = True
                self(x)
            self.seen.append(get_record().groups[self.norm])
            return self.norm(x)

    module = Twice().train()
    deal_statistics(module, 2)
    module(torch.randn(4, 3, 2, 2))
    inner, outer = module.seen
    assert inner is not outer
    assert_nothing_is_open()


def test_scopes_that_do_not_nest_end_each_for_itself():
    first, second = use_domain("day"), use_domain("night")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert get_active_domain() == "night"
    second.__exit__()
    assert_nothing_is_open()


def test_a_generator_that_another_thread_ends_leaves_nothing():
    generator = generate("day", [])
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert_nothing_is_open()


def test_a_scope_belongs_to_its_thread_and_can_be_open_in_several():
    scope, seen, barrier = use_domain("night"), [], threading.Barrier(2)

    def enter():
        with scope:
            barrier.wait()
            seen.append(get_active_domain())
            barrier.wait()
        seen.append(get_active_domain())

    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen, key=str) == [None, None, "night", "night"]
    assert_nothing_is_open()


def test_an_exception_ends_a_scope():
    with pytest.raises(KeyError), use_domain("day"), Scope(frozen=frozenset()):
        raise KeyError
    assert_nothing_is_open()


def test_inner_scopes_add_and_the_record_is_a_value():
    norm, other = BatchNorm2d(3), BatchNorm2d(3)
    with use_groups(norm, [0, 1], 2):
        outer = get_record()
        with use_groups(other, [0, 0], 1), use_domain("day"):
            assert set(get_record().groups) == {norm, other}
        assert set(get_record().groups) == {norm}
    assert outer.domain is None
    assert get_record() == CallRecord()


@pytest.mark.parametrize("kind", ["own", "torch"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_a_frozen_scope_counts_again(kind, way):
    norm = BatchNorm2d(3) if kind == "own" else nn.BatchNorm2d(3)
    model, features = nn.Sequential(nn.Conv2d(3, 3, 1), norm), torch.randn(4, 3, 5, 5)
    with frozen_statistics(model):
        model(features)
        twin = way(model)
    twin(features)
    model(features)
    assert int(twin[1].num_batches_tracked) == int(model[1].num_batches_tracked) == 1


def test_a_copy_made_where_norms_answer_otherwise_has_its_own_answers():
    norm = BatchNorm2d(3)
    with answering([norm], inference="mini_batch"):
        twin = copy.deepcopy(norm)
        assert norm.spec.inference == "mini_batch"
        assert twin.spec.inference == "population"
    assert norm.spec == NormSpec()


def test_answers_are_checked_before_anything_is_open():
    with pytest.raises(ValueError, match="inference"):
        answering([BatchNorm2d(3)], inference="both")
    assert_nothing_is_open()

"""`deal_statistics` within one worker: virtual groups; copies, checkpointing, half types, its end, what it refuses."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext.errors import ConfigError, StatisticsError
from bnext.functional import deal_samples
from bnext.layers import (
    BatchNorm2d,
    LevelBatchNorm2d,
    NormSpec,
    deal_statistics,
    name_norms,
    use_groups,
    virtual_samples,
)
from bnext.layers.deal import draw_seed
from bnext.scope import use_domain
from bnext.statistics import recompute_population_statistics
from bnext.surgery import convert_norm, freeze_norms
from tests import reference
from tests.cases import LEVELS, randomize
from tests.record import assert_nothing_is_open, note_groups

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SAMPLES = 10


def draw(num_samples=SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, 3, 4, 4, generator=generator, dtype=torch.float64)
    return features + torch.arange(num_samples, dtype=torch.float64)[:, None, None, None]


def build(spec=None):
    spec = NormSpec() if spec is None else spec
    head = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), BatchNorm2d(4, spec), nn.ReLU(), nn.Conv2d(4, 5, 1), BatchNorm2d(5, spec)
    )
    randomize(head.double())
    name_norms(head)
    return head.train()


def norms_of(module):
    return [part for part in module.modules() if isinstance(part, BatchNorm2d)]


def groups_of(module):
    """Of the norms, in their next call."""
    noted = note_groups(module)
    module(draw())
    return [noted[norm] for norm in norms_of(module)]


def run(call, head, seed=7, features=None):
    """Output, input gradient, parameter gradients of a step."""
    features = (draw() if features is None else features).clone().requires_grad_()
    head.zero_grad()
    torch.manual_seed(seed)
    output = call(features)
    output.pow(3).sum().backward()
    return [output.detach(), features.grad, *(p.grad for p in head.parameters())]


def dealt(num_groups=3, spec=None):
    head = build(spec)
    deal_statistics(head, num_groups)
    return head


# ---- what it does


@pytest.mark.parametrize("num_groups", [2, 3, 7, 12])
def test_virtual_groups_of_one_worker_are_gathering_and_permuting(num_groups):
    head, plain = dealt(num_groups), build()
    convert_norm(plain, {"": "BN"})
    torch.manual_seed(7)
    deal = deal_samples([SAMPLES], num_groups, draw_seed())

    def shuffle(features):
        return reference.shuffled_by_gathering(plain, [features], deal, num_groups)[0]

    torch.testing.assert_close(run(head, head), run(shuffle, plain), **EXACT)


def test_it_differs_from_no_deal_and_from_step_to_step():
    head, plain = dealt(), build()
    steps = [head(draw()) for _ in range(3)]
    assert not any(torch.allclose(step, plain(draw())) for step in steps)
    assert not torch.allclose(steps[0], steps[1])
    assert not torch.allclose(steps[1], steps[2])


def test_no_samples():
    head = dealt()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    assert run(head, head, features=draw(0))[1].shape == (0, 3, 4, 4)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize("average", ["moving", "cumulative"])
def test_running_statistics_are_those_of_the_whole_batch(average):
    head, whole = dealt(spec=NormSpec(average=average)), build(NormSpec(average=average))
    for step in range(3):
        for model in (head, whole):
            model(draw(seed=step))
    torch.testing.assert_close(head[1].state_dict(), whole[1].state_dict(), **EXACT)


@pytest.mark.parametrize("inference", ["population", "mini_batch"])
def test_evaluation_deals_nothing_draws_nothing_and_leaves_groups_that_somebody_gave(inference):
    spec = NormSpec(inference=inference)
    head, plain = dealt(spec=spec), build(spec)
    head(draw())
    plain.load_state_dict(head.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(head.eval()(draw()), plain.eval()(draw()))
    assert groups_of(head) == [None, None]
    images = torch.arange(SAMPLES) // 4
    with use_groups(head, images, 3), use_groups(plain, images, 3):
        assert torch.equal(head(draw()), plain(draw()))
        assert torch.equal(groups_of(head)[0].numbers, images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["spec", "later", "population"])
def test_norms_that_use_no_mini_batch_are_not_dealt_to(kind):
    specs = {"spec": NormSpec(frozen="statistics"), "later": NormSpec(), "population": NormSpec(training="population")}
    head, plain = dealt(spec=specs[kind]), build(specs[kind])
    if kind == "later":
        for model in (head, plain):
            freeze_norms(model, "statistics")
    state = torch.get_rng_state()
    assert torch.equal(head(draw()), plain(draw()))
    assert torch.equal(torch.get_rng_state(), state)
    assert groups_of(head) == [None, None]


def test_norms_in_training_mode_alone_are_dealt_to():
    """As a re-estimation of population statistics has them."""
    head = dealt().eval()
    head[4].train()
    first, second = groups_of(head)
    assert first is None
    assert second.num_groups == 3


def test_population_statistics_are_re_estimated_under_the_deal():
    head = dealt()
    recompute_population_statistics(head, [draw(seed=step) for step in range(4)], num_batches=4)
    whole = [head[0](draw(seed=step)) for step in range(4)]
    torch.testing.assert_close(head[1].running_mean, torch.cat(whole).mean((0, 2, 3)).detach(), rtol=1e-9, atol=1e-9)
    assert not torch.equal(head(draw()), head(draw())), "the deal is still there"


@pytest.mark.parametrize("name", ["renorm", "domains", "virtual"])
def test_other_answers_beside_a_deal(name):
    """Each group by itself, told by hand."""
    own = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
    spec = {"renorm": NormSpec(training="renorm"), "domains": NormSpec(domains=("day", "night"), **own)}.get(name)
    norm = randomize(BatchNorm2d(3, NormSpec() if spec is None else spec).double()).train()
    twin = copy.deepcopy(norm)
    deal_statistics(norm, 2)
    noted = note_groups(norm)
    torch.manual_seed(3)
    domains = ("day", "night") * 5

    def call(model, features, names):
        with use_domain(names):
            return model(features)

    if name == "virtual":
        with virtual_samples(norm, draw(4, 9)):
            output = call(norm, draw(), domains)
    else:
        output = call(norm, draw(), domains)
    for group in (0, 1):
        mine = noted[norm].numbers == group
        names = tuple(d for d, is_mine in zip(domains, mine.tolist(), strict=True) if is_mine)
        alone = copy.deepcopy(twin)
        if name == "virtual":
            with virtual_samples(alone, draw(4, 9)):
                expected = call(alone, draw()[mine], names)
        else:
            expected = call(alone, draw()[mine], names)
        torch.testing.assert_close(output[mine], expected, **EXACT)


# ---- what may be done with a module that is dealt to


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_of_a_head_and_of_its_parts(use_reentrant):
    results, states = [], []
    for form in ("plain", "whole", "part"):
        head = build()
        parts = [_Checkpointed(part, use_reentrant) for part in (head[:3], head[3:])]
        body = nn.Sequential(*parts) if form == "part" else head
        deal_statistics(body, 3)
        results.append(run(_Checkpointed(body, use_reentrant) if form == "whole" else body, head))
        states.append({key: value.clone() for key, value in head.state_dict().items()})
    for result, state in zip(results[1:], states[1:], strict=True):
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


class _Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_types(dtype):
    head, twin = dealt().float(), dealt().float()
    with torch.autocast("cpu", dtype):
        rough = run(lambda x: head(x).float(), head, features=draw().float())
    exact = run(twin, twin, features=draw().float())
    torch.testing.assert_close(rough[0], exact[0], rtol=0.1, atol=0.1)
    assert all(bool(value.isfinite().all()) for value in rough)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_dealt_to_and_independent(way):
    head = build()
    deal = deal_statistics(head, 3)
    run(head, head)  # with groups in the norms
    twin, twins_deal = way((head, deal))
    torch.testing.assert_close(run(twin, twin), run(head, head), rtol=0, atol=0)
    assert [groups.num_groups for groups in groups_of(twin)] == [3, 3]
    deal.remove()
    run(head, head)
    assert groups_of(head) == [None, None]
    run(twin, twin)
    assert None not in groups_of(twin), "its deal is its own"
    twins_deal.remove()
    run(twin, twin)
    assert groups_of(twin) == [None, None]
    alone = way(dealt())
    run(alone, alone)
    assert None not in groups_of(alone)


def test_what_is_dealt_to_has_the_state_dict_of_what_is_not():
    assert list(dealt().state_dict()) == list(build().state_dict())


def test_remove_leaves_the_module_as_it_was():
    head, plain = build(), build()
    deal = deal_statistics(head, 3)
    head(draw())
    head.load_state_dict(plain.state_dict())
    deal.remove()
    torch.testing.assert_close(run(head, head), run(plain, plain), rtol=0, atol=0)
    deal.remove()  # twice is once


def test_a_second_deal_is_refused_until_the_first_is_removed():
    head = build()
    deal = deal_statistics(head, 2)
    for module in (head, nn.Sequential(head)):
        with pytest.raises(ConfigError, match=r"must be dealt to once; got a deal on .* Call its remove\(\) first"):
            deal_statistics(module, 5)
    deal.remove()
    deal_statistics(head, 5)
    head(draw())
    assert [groups.num_groups for groups in groups_of(head)] == [5, 5]


def test_a_call_that_fails_is_followed_by_one_that_does_not():
    head = dealt()
    with pytest.raises(RuntimeError):
        head(draw()[:, :2])
    head(draw(4))


def test_norms_of_several_workers_that_are_alone_are_told_about_once(caplog):
    head = dealt(None, NormSpec(workers="all"))
    plain = build()
    with caplog.at_level(logging.WARNING, "bnext.layers.deal"):
        output = head(draw())
        head(draw())
    torch.testing.assert_close(output, plain(draw()), **EXACT)
    (record,) = caplog.records
    assert record.getMessage().startswith("Statistics are not dealt (1): there is one group, as one worker shares them")


# ---- what it refuses


@pytest.mark.parametrize("num_groups", [1, 0, -1, True, False, 2.0, "4"])
def test_numbers_that_are_no_groups(num_groups):
    head = build()
    with pytest.raises(ConfigError, match=rf"num_groups must be 2 or more, or None .*; got {num_groups!r} \(deal_stat"):
        deal_statistics(head, num_groups)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(
    ("module", "kind", "text"),
    [
        (nn.Sequential(nn.ReLU()), StatisticsError, r"must have batch norms of bnext.*got none \(Sequential\)\. Conv"),
        (nn.BatchNorm2d(3), StatisticsError, r"got none \(BatchNorm2d\)\. Convert its norms with convert_norm"),
        (LevelBatchNorm2d(3, LEVELS), StatisticsError, r"got one over the levels \('p3', 'p4', 'p5'\)"),
        (
            nn.Sequential(BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))),
            StatisticsError,
            r"must be of bnext; got BatchNorm2d \(1\.1\)\. Convert a BatchNorm2d with convert_norm",
        ),
        (
            nn.Sequential(BatchNorm2d(3), nn.BatchNorm1d(3)),
            StatisticsError,
            r"must be of bnext; got BatchNorm1d \(1\)\. ",
        ),
        (
            BatchNorm2d(3, NormSpec(normalization_batch_size=4)),
            ConfigError,
            r"normalization_batch_size must be None where statistics are dealt; got 4 \(BatchNorm2d\)",
        ),
        (
            nn.Sequential(BatchNorm2d(3, NormSpec(workers="all")), BatchNorm2d(3)),
            ConfigError,
            r"workers must be the same for all norms that share a deal; got 'all' \(.*\) and 'one' \(.*\)\. Convert",
        ),
    ],
)
def test_modules_that_cannot_be_dealt_to(module, kind, text):
    with pytest.raises(kind, match=text):
        deal_statistics(module, 4)
    assert not module._forward_pre_hooks


def test_workers_with_batches_of_their_own_need_a_number_of_groups():
    head = build()
    with pytest.raises(
        ConfigError, match=r"num_groups must be given .*; got None with workers='one' \(1\)\. "
    ) as error:
        deal_statistics(head)
    remedy = str(error.value).rpartition("workers: ")[2].rstrip(".")
    eval(remedy, {"convert_norm": convert_norm, "module": head, "NormSpec": NormSpec})
    deal_statistics(head)


def test_norms_that_are_frozen_need_not_have_the_same_workers():
    head = nn.Sequential(BatchNorm2d(3, NormSpec(frozen="both")), BatchNorm2d(3, NormSpec(workers="all")))
    deal_statistics(head)


def test_norms_with_domains_of_their_own_are_bnexts():
    own = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
    deal_statistics(BatchNorm2d(3, NormSpec(domains=("day", "night"), **own)), 2)


@pytest.mark.parametrize(("args", "text"), [(([draw()],), "got list"), ((), "got no argument")])
def test_the_feature_comes_first(args, text):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm2d(3)

        def forward(self, features=()):
            return [self.norm(x) for x in features]

    head = Head()
    deal_statistics(head, 2)
    with pytest.raises(StatisticsError, match=rf"must get their features .* first; {text} \(.*\)\. Deal a part of it"):
        head(*args)


def test_another_spec_after_the_deal_is_refused_where_it_contradicts():
    head = dealt()
    head[4].spec = head[4].spec.replace(normalization_batch_size=2)
    with pytest.raises(StatisticsError, match=r"must be None where samples have groups; got 2 \(4\)"):
        head(draw())
    head = dealt()
    head[4].spec = head[4].spec.replace(workers="all")
    with pytest.raises(ConfigError, match=r"got 'one' \(1\) and 'all' \(4\)"):
        head(draw())


def test_groups_do_not_stay_behind_when_modes_are_put_back_without_a_call_of_eval():
    norm = BatchNorm2d(3, NormSpec(inference="mini_batch"))
    head = nn.Sequential(nn.Conv2d(3, 3, 1), norm).double()
    deal_statistics(head, 3)
    before = head.eval()(draw())
    recompute_population_statistics(head, [draw(seed=step) for step in range(3)])
    torch.testing.assert_close(head(draw()), before, rtol=0, atol=0)
    head(draw(4))
    assert_nothing_is_open()

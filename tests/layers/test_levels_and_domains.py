"""Norms that see several levels of images of several domains: all answers, against the definition and one another."""

import itertools

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError, DomainError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.sources import Source, find_origin
from bnext.scope import use_domain
from tests.cases import DOMAINS, LEVELS, NUM_CHANNELS, PAIRED, make_features, make_pairs, randomize
from tests.layers.test_batch_norm_parity import check_step
from tests.workers import run_workers

BOTH = "per_level_and_domain"
SHARING = ("shared", "per_level", "per_domain", BOTH)
OWN = NormSpec(statistics=BOTH, population=BOTH, affine=BOTH, domains=DOMAINS)
EXACT = {"rtol": 1e-11, "atol": 1e-11}
SAME = {"rtol": 0, "atol": 0}
COMBINATIONS = [
    answers
    for answers in itertools.product(SHARING, (*SHARING, "none"), (*SHARING, "none"))
    if any("domain" in answer for answer in answers)
]
# Answers by which a mini-batch is of one domain, so that a batch of several is as many batches.
APART = [(statistics, *rest) for statistics, *rest in COMBINATIONS if "domain" in statistics]
every = pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"])


def build(spec, levels=LEVELS, seed=1):
    return randomize(LevelBatchNorm2d(NUM_CHANNELS, levels, spec).double(), seed).train()


def draw(seed, number):
    """Levels of `number` images."""
    return make_features(seed, tuple((number, *size) for size in ((6, 5), (3, 3), (2, 1))))


def run(norm, features, names, grads):
    """Outputs and gradients of the features; those of parameters add up."""
    features = {level: feature.clone().requires_grad_() for level, feature in features.items()}
    with use_domain(names):
        outputs = norm(features)
    torch.autograd.backward(list(outputs.values()), [grads[level] for level in outputs])
    return [output.detach() for output in outputs.values()], [feature.grad for feature in features.values()]


def state_of(norm):
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return dict(norm.state_dict()), gradients


@every
@pytest.mark.parametrize("training", ["mini_batch", "renorm", "population"])
def test_combinations_are_the_definition(training, step):
    for statistics, population, affine in COMBINATIONS[::step]:
        if population == "none" and training != "mini_batch":
            continue
        changes = {"inference": "mini_batch"} if population == "none" else {}
        case = make_pairs(statistics, population, affine, training=training, **changes)
        norm = case.build().train()
        for seed in range(2):
            check_step(case, norm, case.inputs(seed=seed, requires_grad=True), case.inputs(seed=100 + seed))


@every
@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_a_mixed_batch_is_the_domains_one_after_another(number, step):
    domains = tuple(f"camera{index}" for index in range(number))
    names = [domains[index % number] for index in (3, 0, 5, 7, 1, 6, 2, 4, 0)]
    for statistics, population, affine in APART[::step]:
        inference = "mini_batch" if population == "none" else "population"
        spec = NormSpec(
            statistics=statistics, population=population, affine=affine, domains=domains, inference=inference
        )
        mixed, apart = build(spec), build(spec)
        features, grads = draw(0, len(names)), draw(1, len(names))
        outputs, gradients = run(mixed, features, names, grads)

        for domain in domains:
            mine = [index for index, name in enumerate(names) if name == domain]
            parts = ({level: x[mine] for level, x in tensors.items()} for tensors in (features, grads))
            of_domain, of_features = run(apart, next(parts), domain, next(parts))
            torch.testing.assert_close([output[mine] for output in outputs], of_domain, **EXACT)
            torch.testing.assert_close([gradient[mine] for gradient in gradients], of_features, **EXACT)
        torch.testing.assert_close(state_of(mixed), state_of(apart), **EXACT)


def run_share(rank, specs, shares):
    names, number = shares[rank], len(shares[rank])
    results = []
    for spec in specs:
        norm = build(spec)
        results.append((run(norm, draw(rank, number), names, draw(10 + rank, number)), state_of(norm)))
    return results, run_in_parallel(rank, names)


def run_in_parallel(rank, names):
    """Gradients of DistributedDataParallel, which waits for each parameter on each worker."""
    norm = build(OWN.replace(affine="per_domain"))
    parallel = DistributedDataParallel(norm)
    for step in range(2):
        run(parallel, draw(step, len(names)), names, draw(10 + rank, len(names)))
    return state_of(norm)[1]


def test_workers_of_which_one_lacks_a_domain_are_one_process():
    specs = []
    for statistics, population, affine in (
        (BOTH, BOTH, BOTH),
        ("per_domain", BOTH, "per_level"),
        ("per_level", "per_domain", "shared"),
    ):
        specs.append(OWN.replace(statistics=statistics, population=population, affine=affine, workers="all"))
    shares = (("day", "night", "day"), ("night", "night"))

    answers = run_workers(run_share, 2, specs, shares)
    by_worker, in_parallel = zip(*answers, strict=True)
    torch.testing.assert_close(*in_parallel, **SAME)
    assert {name for name, gradient in in_parallel[0].items() if gradient.any()} == {
        f"{domain}.{field}" for domain in ("day", "night") for field in ("weight", "bias")
    }
    for spec, first, second in zip(specs, *by_worker, strict=True):
        norm = build(spec.replace(workers="one"))
        features, grads = (
            {level: torch.cat([draw(start, 3)[level], draw(start + 1, 2)[level]]) for level in LEVELS}
            for start in (0, 10)
        )
        whole = run(norm, features, shares[0] + shares[1], grads)
        joined = [
            [torch.cat(pair) for pair in zip(*kinds, strict=True)] for kinds in zip(first[0], second[0], strict=True)
        ]
        torch.testing.assert_close(joined, list(whole), **EXACT)

        state, gradients = state_of(norm)
        for worker in (first, second):
            torch.testing.assert_close(worker[1][0], state, **EXACT)
        summed = {name: first[1][1][name] + second[1][1][name] for name in gradients}
        torch.testing.assert_close(summed, gradients, **EXACT)


@pytest.mark.parametrize("names", ["day", ["day", "day"]])
def test_one_domain_is_the_norm_without_domains_bit_for_bit(names):
    per_level = NormSpec.from_table5_row(6)
    own = OWN.replace(domains=("day",))
    norm = build(own)
    plain = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, per_level).double().train()
    plain.load_state_dict({key.removeprefix("day_"): value for key, value in norm.state_dict().items()})
    for step in range(2):
        features, grads = draw(step, 2), draw(10 + step, 2)
        torch.testing.assert_close(run(norm, features, names, grads), run(plain, features, names, grads), **SAME)
    for actual, expected in zip(state_of(norm), state_of(plain), strict=True):
        torch.testing.assert_close({key.removeprefix("day_"): value for key, value in actual.items()}, expected, **SAME)
    with use_domain(names):
        torch.testing.assert_close(norm.eval()(draw(5, 2)), plain.eval()(draw(5, 2)), **SAME)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", ["night", PAIRED])
@pytest.mark.parametrize("affine", ["per_domain", BOTH])
def test_what_an_absent_domain_owns_gets_a_gradient_of_zero(affine, names, training):
    """DistributedDataParallel waits for it."""
    norm = build(OWN.replace(affine=affine)).train(training)
    run(norm, draw(0, 2), names, draw(1, 2))
    for name, parameter in norm.named_parameters():
        is_used = name.partition("_")[0].partition(".")[0] in names
        assert bool(parameter.grad.any()) == is_used, name


def test_a_level_without_samples_names_none():
    norm, other = build(OWN), build(OWN)
    features = draw(0, 2)
    with use_domain(PAIRED):
        outputs = norm({**features, "p4": features["p4"][:0]})
        expected = other({level: feature for level, feature in features.items() if level != "p4"})
    assert not len(outputs.pop("p4"))
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(dict(norm.state_dict()), dict(other.state_dict()), **EXACT)


def test_a_domain_that_no_image_can_have_and_a_missing_one_are_refused():
    norm = build(OWN)
    norm.path = "head.norm"
    with pytest.raises(DomainError, match=r"head\.norm"):
        norm(draw(0, 2))
    for names in ("rain", ["day", "rain"], ["day"]):
        with pytest.raises(DomainError, match=r"head\.norm"), use_domain(names):
            norm(draw(0, 2))


@pytest.mark.parametrize(
    ("levels", "domains"),
    [
        (("p3", "p4"), ("day", "p3")),
        (("b_c", "c"), ("a", "a_b")),
        (("mean", "var"), ("running", "day")),
        (("p3",), ("day", "day_p3")),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(levels, domains):
    with pytest.raises(ConfigError, match="levels and domains"):
        LevelBatchNorm2d(NUM_CHANNELS, levels, OWN.replace(domains=domains))


# ---- state of one layout in a norm of another


SOURCES = {
    "plain": (BatchNorm2d(NUM_CHANNELS), lambda level, domain: ""),
    "levels": (
        LevelBatchNorm2d(NUM_CHANNELS, LEVELS, NormSpec.from_table5_row(6)),
        lambda level, domain: f"{level}.",
    ),
    "domains": (
        BatchNorm2d(NUM_CHANNELS, NormSpec(population="per_domain", affine="per_domain", domains=DOMAINS)),
        lambda level, domain: f"{domain}.",
    ),
    "both": (LevelBatchNorm2d(NUM_CHANNELS, LEVELS, OWN), lambda level, domain: f"{domain}_{level}."),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_pair_loads_what_it_had_in_common_with_others_and_gives_it_back(name):
    source, find_prefix = SOURCES[name]
    source = randomize(source.double(), seed=3)
    norm = build(OWN)
    norm.load_state_dict(source.state_dict())
    state = norm.state_dict()
    for level, domain in itertools.product(LEVELS, DOMAINS):
        for field in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            expected = source.state_dict()[f"{find_prefix(level, domain)}{field}"]
            assert torch.equal(state[f"{domain}_{level}.{field}"], expected)

    before = {key: value.clone() for key, value in source.state_dict().items()}
    randomize(source, seed=4).load_state_dict(state)
    torch.testing.assert_close(dict(source.state_dict()), before, **SAME)


@pytest.mark.parametrize(
    ("source", "names", "expected"),
    [
        (Source("p3", "night"), ["night_p3", "night_p4"], ["night_p3"]),
        (Source(domain="night"), ["day_p3", "night_p3", "night_p4", "day_p4"], ["night_p3", "night_p4"]),
        (Source(domain="rain"), ["day", "day_rain"], []),
        (Source("p3"), ["p3", "p4", "day_p3"], ["p3"]),
        (Source("p3", "night"), ["day_p3", "day_p4"], []),
    ],
)
def test_a_name_is_half_of_a_pair_only_among_pairs(source, names, expected):
    assert find_origin(source, names, {}).names == expected


@pytest.mark.parametrize(
    ("name_map", "expected"),
    [
        ({"night": "day"}, "day_p3"),
        ({"night": "day", "p3": "p4"}, "day_p4"),
        ({"night_p3": "day_p4"}, "day_p4"),
    ],
)
def test_a_map_of_names_is_of_levels_domains_or_pairs(name_map, expected):
    names = ["day_p3", "day_p4", "night_p3", "night_p4"]
    assert find_origin(Source("p3", "night"), names, name_map).names == [expected]
    assert find_origin(Source("p3"), names, {"": "night"}).names == ["night_p3"]


@pytest.mark.parametrize("names", [LEVELS, ("0", "1", "2")])
def test_pairs_that_differ_are_merged_into_a_level_and_it_is_said(caplog, names):
    norm = build(OWN, names)
    levels = LevelBatchNorm2d(NUM_CHANNELS, names, NormSpec.from_table5_row(6)).double()
    levels.load_state_dict(norm.state_dict())
    for level in names:
        means = [norm.population_state(f"{domain}_{level}").running_mean for domain in DOMAINS]
        torch.testing.assert_close(levels.population_state(level).running_mean, torch.stack(means).mean(0), **EXACT)
    assert "merged" in caplog.text

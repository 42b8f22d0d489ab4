"""Domains that come, go, merge and become plain norms: by slow definitions, and nothing else moves by a bit."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope import use_domain
from bnext.statistics import recompute_population_statistics
from bnext.surgery import add_domain, drop_domain, list_domains, merge_domains, select_domain
from tests.cases import randomize

DOMAINS = ("day", "night", "fog")
NUM_CHANNELS = 4
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
# Whose state there is: both halves, one of them, or none.
SPECS = {
    "own": OWN,
    "own_population": OWN.replace(affine="shared"),
    "own_affine": OWN.replace(population="shared"),
    "own_statistics": OWN.replace(population="shared", affine="shared"),
    "frozen": OWN.replace(frozen="both"),
    "by_mini_batch": OWN.replace(inference="mini_batch"),
    "no_affine": OWN.replace(affine="none", workers="all"),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def build(spec=OWN, dtype=torch.float64):
    norms = [BatchNorm2d(NUM_CHANNELS, spec), nn.ReLU(), LevelBatchNorm2d(NUM_CHANNELS, ("p3",)).eval()]
    return randomize(nn.Sequential(*norms).to(dtype)).eval()


def draw(n=3):
    return torch.randn(n, NUM_CHANNELS, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model, domain):
    with use_domain(domain):
        return model[0](draw())


def state_of(model, domain):
    prefix = f"0.{domain}."
    return {k.removeprefix(prefix): v.clone() for k, v in model.state_dict().items() if k.startswith(prefix)}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


def merge_slowly(states, weights):
    """Moments of a union: of its mean, and of the squares of all deviations from it."""
    merged, total = {}, sum(weights)
    for name in ("weight", "bias") if "weight" in states[0] else ():
        merged[name] = sum(state[name] for state in states) / len(states)
    if "running_mean" in states[0]:
        pairs = list(zip(weights, states, strict=True))
        mean = sum(weight * state["running_mean"] for weight, state in pairs) / total
        squares = sum(weight * (state["running_var"] + state["running_mean"] ** 2) for weight, state in pairs) / total
        merged |= {"running_mean": mean, "running_var": squares - mean**2, "num_batches_tracked": torch.tensor(7)}
    return merged


@each_spec
@pytest.mark.parametrize("like", ["night", None])
def test_a_new_domain_begins_as_another_or_as_the_mixture(spec, like):
    model = build(spec)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    outputs = {domain: run(model, domain) for domain in DOMAINS}

    report = add_domain(model, "dusk", like)
    assert report.keeps_outputs
    assert list_domains(model) == (*DOMAINS, "dusk")
    assert model[0].spec == spec.replace(domains=(*DOMAINS, "dusk"))
    assert_equal({k: v for k, v in model.state_dict().items() if ".dusk." not in k}, before)
    assert all(any(p is parameter for p in model.parameters()) for parameter in parameters), "an optimizer knows them"
    assert all(torch.equal(run(model, domain), output) for domain, output in outputs.items())

    states = [state_of(model, domain) for domain in ([like] if like else DOMAINS)]
    torch.testing.assert_close(state_of(model, "dusk"), merge_slowly(states, [1] * len(states)))
    if like:
        assert torch.equal(run(model, "dusk"), outputs[like])
    frozen = {name for name, p in model[0].named_parameters() if not p.requires_grad}
    assert len(frozen) in ((8,) if spec.frozen == "both" else (0,))


@each_spec
def test_a_domain_that_was_added_and_dropped_leaves_nothing(spec):
    model = build(spec)
    before, spec = copy.deepcopy(model.state_dict()), model[0].spec
    add_domain(model, "dusk", like="fog")
    assert drop_domain(model, "dusk").keeps_outputs
    assert model[0].spec == spec
    assert_equal(model.state_dict(), before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build(spec).named_modules()]
    build(spec).load_state_dict(model.state_dict())


@each_spec
@pytest.mark.parametrize(("into", "weights"), [("night", None), ("light", {"night": 3, "day": 1})])
def test_merged_domains_are_the_moments_of_their_union(spec, into, weights):
    model = build(spec.replace(fallback_domain="night"))
    states = [state_of(model, domain) for domain in ("night", "day")]
    fog = run(model, "fog")
    report = merge_domains(model, ["night", "day"], into, num_samples=weights)
    assert not report.keeps_outputs
    assert model[0].spec.domains == (into, "fog")
    assert model[0].spec.fallback_domain == into
    torch.testing.assert_close(state_of(model, into), merge_slowly(states, [3, 1] if weights else [1, 1]))
    assert torch.equal(run(model, "fog"), fog)


@each_spec
@pytest.mark.parametrize("form", ["bnext", "torch"])
def test_a_selected_domain_is_a_plain_norm_of_equal_outputs(spec, form):
    model = build(spec.replace(fallback_domain="day"))
    expected = run(model, "night")
    report = select_domain(model, "night", form)
    is_kept = form == "bnext" or spec.inference == "population"
    assert report.keeps_outputs == is_kept
    assert torch.equal(model[0](draw()), expected) == is_kept
    assert set(model[0].state_dict()) <= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    if form == "bnext":
        shared = {field: "shared" for field, answer in vars(spec).items() if answer == "per_domain"}
        assert model[0].spec == spec.replace(**shared, domains=())
        BatchNorm2d(NUM_CHANNELS, model[0].spec).double().load_state_dict(model[0].state_dict())
    else:
        assert type(model[0]) is (nn.SyncBatchNorm if spec.workers == "all" else nn.BatchNorm2d)
        assert not model[0].training


def test_a_selected_norm_at_two_places_stays_one():
    norm = randomize(BatchNorm2d(NUM_CHANNELS, OWN))
    model = nn.Sequential(norm, nn.ReLU(), norm).eval()
    x = torch.randn(2, NUM_CHANNELS, 3, 3)
    with use_domain("night"):
        expected = model(x)
    select_domain(model, "night", form="torch")
    assert type(model[0]) is nn.BatchNorm2d
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), expected)


def test_a_selected_norm_goes_on_training_as_torchs():
    model = build().train()
    parameters = set(model[0].get_submodule("fog").parameters())
    select_domain(model, "fog")
    plain = nn.BatchNorm2d(NUM_CHANNELS).double()
    plain.load_state_dict(model[0].state_dict())
    assert set(model[0].parameters()) == parameters
    torch.testing.assert_close(model[0](draw()), plain(draw()))
    torch.testing.assert_close(dict(model[0].state_dict()), dict(plain.state_dict()))


def test_statistics_of_a_new_domain_come_from_its_images_alone():
    model = build()
    add_domain(model, "dusk", like="day")
    before = copy.deepcopy(model.state_dict())
    images = [draw() + 5]
    layers = lambda path, norm: path == "0"  # noqa: E731
    recompute_population_statistics(model, images, domain="dusk", layers=layers, forward=lambda model, x: model[0](x))
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"0.dusk.running_mean", "0.dusk.running_var", "0.dusk.num_batches_tracked"}
    torch.testing.assert_close(after["0.dusk.running_mean"], images[0].mean((0, 2, 3)))


def test_keys_carry_the_names_and_load_into_plain_norms_and_back():
    model = build()
    merge_domains(model, DOMAINS, "all")
    assert {key for key in model.state_dict() if key.startswith("0.")} == {
        f"0.all.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    plain, named = build(NormSpec()), build(OWN.replace(domains=("all",)))
    plain.load_state_dict(model.state_dict())
    named.load_state_dict(plain.state_dict())
    assert_equal(named.state_dict(), model.state_dict())


def test_hooks_settings_and_mode_stay():
    model, seen = build().train(), []
    norm = model[0]
    norm.momentum, norm.r_max = 0.3, 2.0
    norm.register_forward_hook(lambda *_: seen.append(1))
    add_domain(model, "dusk")
    merge_domains(model, ["day", "night"], "light")
    drop_domain(model, "fog")
    select_domain(model, "dusk")
    model[0](draw())
    assert model[0] is norm
    assert (norm.momentum, norm.r_max, norm.training, seen) == (0.3, 2.0, True, [1])


def test_what_is_refused_changes_nothing():
    model, plain, fallback = build(), nn.Sequential(nn.BatchNorm2d(2)), build(OWN.replace(fallback_domain="day"))
    one, wrapped = build(OWN.replace(domains=("day",))), DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    levels = build()
    other = nn.ModuleDict({"a": build(), "b": build(OWN.replace(domains=("day", "dusk")))})
    alone = BatchNorm2d(2, OWN)
    at_levels = nn.Sequential(LevelBatchNorm2d(2, ("p3",), OWN))
    cases = [
        (add_domain, (plain, "night"), "norms with domains"),
        (add_domain, (wrapped, "night"), "DistributedDataParallel"),
        (add_domain, (model, "night"), "name of its own"),
        (add_domain, (model, "a.b"), "without dots"),
        (add_domain, (model, "weight"), "attribute"),
        (add_domain, (at_levels, 3), "without dots"),
        (add_domain, (model, "dusk", "nihgt"), "Did you mean 'night'"),
        (drop_domain, (model, "dusk"), "to drop"),
        (drop_domain, (one, "day"), "the last one"),
        (drop_domain, (fallback, "day"), "FALLBACK"),
        (merge_domains, (model, ["day", "day"], "x"), "two or more"),
        (merge_domains, (model, ["day"], "x"), "two or more"),
        (merge_domains, (model, "day", "x"), "two or more"),
        (merge_domains, (model, None, "x"), "two or more"),
        (merge_domains, (model, [["day"], ["night"]], "x"), "two or more"),
        (merge_domains, (model, ["day", "dusk"], "x"), "to merge"),
        (merge_domains, (other, ["day", "dusk"], "x"), "to merge"),
        (merge_domains, (model, ["day", "night"], "fog"), "name of its own"),
        (merge_domains, (model, ["day", "night"], "bias"), "attribute"),
        (select_domain, (model, "dusk"), "to select"),
        (select_domain, (other, "dusk"), "every norm"),
        (select_domain, (alone, "day", "torch"), "in a module"),
        (select_domain, (levels, "day", "caffe"), "form must be"),
    ]
    for function, arguments, words in cases:
        before = copy.deepcopy(arguments[0].state_dict())
        with pytest.raises(ConfigError, match=words):
            function(*arguments)
        assert_equal(arguments[0].state_dict(), before)

    for numbers in ({"day": 1}, {"day": 1, "night": 0}, {"day": 1, "night": float("nan")}, {"day": "3", "night": 1}):
        with pytest.raises(ConfigError, match="num_samples"):
            merge_domains(model, ["day", "night"], "x", num_samples=numbers)


def test_a_merge_does_not_depend_on_the_order_of_its_names():
    states = []
    for names in itertools.permutations(DOMAINS):
        model = build()
        merge_domains(model, names, "all", num_samples={"day": 1, "night": 2, "fog": 5})
        states.append(state_of(model, "all"))
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])


# ---- domains at several levels

PAIRS = {
    "pairs": ("per_level_and_domain",) * 3,
    "pairs_of_population": ("per_level_and_domain", "per_level_and_domain", "per_domain"),
    "affine_of_levels": ("per_level_and_domain", "per_level_and_domain", "per_level"),
    "population_of_levels": ("per_domain", "per_level", "per_level_and_domain"),
    "shared_but_statistics": ("per_level_and_domain", "shared", "shared"),
}
LEVELS = ("p3", "p4")


def build_pairs(answers):
    statistics, population, affine = answers
    spec = NormSpec(statistics=statistics, population=population, affine=affine, domains=DOMAINS)
    return randomize(LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).double()).eval()


@torch.no_grad()
def run_levels(norm, domain=None):
    features = {"p3": draw(), "p4": draw()[:, :, :1] + 1}
    with contextlib.nullcontext() if domain is None else use_domain(domain):
        return list(norm(features).values())


def by_level(norm, domain, fields=("weight", "running_mean", "running_var")):
    """Level -> what normalizes it."""
    values = {}
    for level in LEVELS:
        affine, population = norm.affine_state(f"{domain}_{level}"), norm.population_state(f"{domain}_{level}")
        values[level] = {f: getattr(affine if f == "weight" else population, f).detach().clone() for f in fields}
    return values


@pytest.mark.parametrize("answers", PAIRS.values(), ids=PAIRS)
def test_domains_at_several_levels(answers):
    norm = build_pairs(answers)
    before = copy.deepcopy(norm.state_dict())
    expected = {domain: run_levels(norm, domain) for domain in DOMAINS}
    add_domain(norm, "dusk", like="night")
    assert all(map(torch.equal, run_levels(norm, "dusk"), expected["night"]))
    drop_domain(norm, "dusk")
    assert_equal(norm.state_dict(), before)

    merged = copy.deepcopy(norm)
    states = [by_level(norm, domain) for domain in ("day", "fog")]
    merge_domains(merged, ["day", "fog"], "light")
    for level, state in by_level(merged, "light").items():
        slowly = merge_slowly([one[level] | {"bias": torch.zeros(1)} for one in states], [1, 1])
        del slowly["bias"], slowly["num_batches_tracked"]
        torch.testing.assert_close(state, slowly)
    assert all(map(torch.equal, run_levels(merged, "night"), expected["night"]))

    trained = {id(parameter) for parameter in norm.parameters()}
    assert select_domain(norm, "night").keeps_outputs
    assert all(map(torch.equal, run_levels(norm), expected["night"]))
    assert {id(parameter) for parameter in norm.parameters()} <= trained
    assert not norm.spec.has_domains
    LevelBatchNorm2d(NUM_CHANNELS, LEVELS, norm.spec).double().load_state_dict(norm.state_dict())
    with pytest.raises(ConfigError, match="several levels"):
        select_domain(nn.Sequential(build_pairs(answers)), "night", form="torch")

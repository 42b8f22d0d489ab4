"""Named domains: a mixed batch is the domains one after another; nothing depends on the order of calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnext.errors import DomainError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.layers.counts import counts_of
from bnext.scope import frozen_statistics, use_domain
from tests import strategies
from tests.cases import DOMAINS, NUM_CHANNELS, randomize

EXACT = {"rtol": 1e-11, "atol": 1e-11}
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
# Statistics per domain; who owns the rest, and how it is normalized, must not matter.
APART = {
    "own": OWN,
    "affine_shared": OWN.replace(affine="shared"),
    "no_affine": OWN.replace(affine="none"),
    "renorm": OWN.replace(training="renorm"),
    "by_population": OWN.replace(training="population"),
    "cumulative": OWN.replace(average="cumulative"),
    "frozen": OWN.replace(frozen="statistics"),
    "no_population": OWN.replace(population="none", inference="mini_batch"),
}
apart = pytest.mark.parametrize("spec", APART.values(), ids=APART)


def build(spec):
    return randomize(BatchNorm2d(NUM_CHANNELS, spec).double()).train()


def draw(seed, n=6, h=2, w=3):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64) * scale + 2 * scale


def run(norm, x, names, grad):
    x = x.clone().requires_grad_()
    with use_domain(names):
        output = norm(x)
    output.backward(grad)
    return output, x.grad


def gradients_of(norm):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in norm.named_parameters()}


compositions = st.lists(st.sampled_from(DOMAINS), min_size=1, max_size=7)


@apart
@given(seed=strategies.seeds, names=compositions)
@settings(max_examples=15, deadline=None)
def test_a_mixed_batch_is_the_domains_one_after_another(spec, seed, names):
    mixed, one_by_one = build(spec), build(spec)
    x, grad = draw(seed, len(names)), draw(seed + 1, len(names))
    output, gradient = run(mixed, x, names, grad)
    for domain in DOMAINS:
        mine = [index for index, name in enumerate(names) if name == domain]
        if mine:
            own, own_gradient = run(one_by_one, x[mine], domain, grad[mine])
            torch.testing.assert_close(output[mine], own, **EXACT)
            torch.testing.assert_close(gradient[mine], own_gradient, **EXACT)
    torch.testing.assert_close(gradients_of(mixed), gradients_of(one_by_one), **EXACT)
    torch.testing.assert_close(dict(mixed.state_dict()), dict(one_by_one.state_dict()), **EXACT)
    if spec.population != "none":
        with use_domain(names):
            evaluated = mixed.eval()(x)
        for index, name in enumerate(names):
            with use_domain(name):
                torch.testing.assert_close(evaluated[index : index + 1], mixed(x[index : index + 1]), **EXACT)


@pytest.mark.parametrize("statistics", ["per_domain", "shared"])
@given(seed=strategies.seeds, names=compositions, random=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_permuting_samples_permutes_outputs(statistics, seed, names, random):
    spec = OWN.replace(statistics=statistics)
    norm, other = build(spec), build(spec)
    order = list(range(len(names)))
    random.shuffle(order)
    x, grad = draw(seed, len(names)), draw(seed + 1, len(names))
    output, gradient = run(norm, x, names, grad)
    same, same_gradient = run(other, x[order], [names[index] for index in order], grad[order])
    torch.testing.assert_close(same, output[order], **EXACT)
    torch.testing.assert_close(same_gradient, gradient[order], **EXACT)
    torch.testing.assert_close(gradients_of(other), gradients_of(norm), **EXACT)
    torch.testing.assert_close(dict(other.state_dict()), dict(norm.state_dict()), **EXACT)


@pytest.mark.parametrize("mixed", [True, False])
@given(seed=strategies.seeds, n=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_one_domain_is_a_plain_batch_norm(mixed, seed, n):
    norm = build(OWN.replace(domains=("day",)))
    plain = randomize(nn.BatchNorm2d(NUM_CHANNELS).double())
    plain.load_state_dict({key.removeprefix("day."): value for key, value in norm.state_dict().items()})
    for step in range(2):
        x, grad = draw(seed + step, n), draw(seed + 10, n)
        mine = x.clone().requires_grad_()
        expected = plain(mine)
        expected.backward(grad)
        torch.testing.assert_close(run(norm, x, ["day"] * n if mixed else "day", grad), (expected, mine.grad), **EXACT)
    state = {key.removeprefix("day."): value for key, value in norm.state_dict().items()}
    torch.testing.assert_close(state, dict(plain.state_dict()), **EXACT)


@apart
def test_domains_of_equal_state_are_a_norm_for_each(spec):
    """What belongs to a domain is touched by its samples only."""
    norm = build(spec)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    run(norm, draw(0), "night", draw(1))
    for key, value in norm.state_dict().items():
        assert key.startswith("night") or torch.equal(value, before[key]), key
    for name, parameter in norm.named_parameters():
        assert "." not in name or name.startswith("night") or parameter.grad is None or not parameter.grad.any()


def test_no_call_is_counted():
    """Domains by call order are misaligned for ever after one partial forward (CycleBatchNormList)."""
    norm, other = build(OWN), build(OWN)
    for domain in ("day", "night", "fog"):
        run(norm, draw(0), domain, draw(1))
    with pytest.raises(DomainError):
        run(other, draw(0), "rain", draw(1))
    for domain in ("fog", "day", "night"):
        run(other, draw(0), domain, draw(1))
    torch.testing.assert_close(dict(norm.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_no_or_an_unknown_domain_is_an_error_that_names_the_layer(training):
    norm = build(OWN).train(training)
    norm.path = "backbone.stem.norm"
    rest = r"in backbone.stem.norm, which has the domains \('day', 'night', 'fog'\). Wrap the call in `with use_domain"
    with pytest.raises(DomainError, match=f"No domain is active {rest}"):
        norm(draw(0))
    for names in ("rain", ["day"] * 5 + ["rain"]):
        with pytest.raises(DomainError, match=f"Domain 'rain' is unknown {rest}"), use_domain(names):
            norm(draw(0))
    for count in (1, 5, 7):
        text = rf"one domain per sample; got {count} names for 6 samples \(backbone.stem.norm\)"
        with pytest.raises(DomainError, match=text), use_domain(["day"] * count):
            norm(draw(0))


def test_the_fallback_is_taken_for_none_and_for_the_unknown():
    norm, named = build(OWN.replace(fallback_domain="fog")), build(OWN)
    with use_domain(["day", "fog", "fog", "day", "fog", "fog"]):
        expected = named(draw(0))
    with use_domain(["day", "rain", "fog", "day", "snow", "fog"]):
        torch.testing.assert_close(norm(draw(0)), expected, **EXACT)
    with use_domain("fog"):
        expected = named(draw(0))
    torch.testing.assert_close(norm(draw(0)), expected, **EXACT)
    torch.testing.assert_close(dict(norm.state_dict()), dict(named.state_dict()), **EXACT)


def test_no_message_offers_a_fallback_which_would_train_all_as_one():
    with pytest.raises(DomainError) as refusal:
        build(OWN)(draw(0))
    assert "FALLBACK" not in str(refusal.value).upper()


def test_a_fallback_that_is_taken_is_counted_and_said_once(caplog):
    norm = build(OWN.replace(domains=("day", "mist"), fallback_domain="mist"))
    norm.path = "stem.norm"
    with use_domain(["day", "rain", "mist", "day", "snow", "rain"]):
        norm(draw(0)), norm(draw(0))
    norm.eval()(draw(0))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert all(words in message for words, message in zip(("'rain'", "'snow'", "without"), said, strict=True))
    assert all("'mist'" in message and "stem.norm" in message for message in said)
    assert counts_of(norm).fallbacks == {"rain": 4, "snow": 2}, "in training"
    assert counts_of(norm).unseen == {(None, "fallback", "mist"): 6}, "at inference"
    assert counts_of(norm).domains == {"day": 4, "mist": 8}, "in training"


def test_what_is_no_training_is_not_counted():
    norm = build(OWN)
    with use_domain("day"), frozen_statistics(norm):
        norm(draw(0))
    assert not counts_of(norm).domains


def test_a_norm_without_domains_does_not_ask_for_one():
    norm, plain = build(NormSpec()), build(NormSpec())
    with use_domain(["anything"] * 2):
        output = norm(draw(0))
    torch.testing.assert_close(output, plain(draw(0)), rtol=0, atol=0)


def test_norms_of_a_model_see_the_domain_of_the_call():
    model = nn.Sequential(nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1).double(), build(OWN), nn.ReLU(True), build(OWN))
    with use_domain(["day", "night", "night", "day", "day", "day"]):
        model(draw(0)).square().sum().backward()
    for index in (1, 3):
        moved = {name for name in DOMAINS if int(model[index].get_submodule(name).num_batches_tracked) == 8}
        assert moved == {"day", "night"}

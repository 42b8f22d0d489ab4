"""Images of an unseen domain: each rule against its definition, in pure and mixed batches, alone and as RoIs."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from bnext.errors import ConfigError, DomainError
from bnext.layers import BatchNorm2d, CycleBatchNormList, LevelBatchNorm2d, NormSpec, use_groups
from bnext.layers.counts import UnseenCount, describe_unseen, take_unseen_counts
from bnext.layers.unseen import (
    NOISE_OF_LOG_VAR,
    NOISE_OF_MEAN,
    STREAM_BOUND,
    STREAM_JUMP,
    STREAM_MEMORY,
    STREAM_RETURN,
    applying_rule,
    forget_stream,
    one_forward,
    tell_forwards,
)
from bnext.scope import frozen_statistics, use_domain, use_level
from tests import reference, strategies
from tests.cases import DOMAINS, LEVELS, NUM_CHANNELS, make_features, randomize

EXACT = {"rtol": 1e-11, "atol": 1e-11}
OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
MIXED = ("day", "rain", "night", "rain", "snow", "fog")


def build(spec, seed=1):
    return randomize(BatchNorm2d(NUM_CHANNELS, spec).double(), seed).eval()


def draw(seed=0, n=6, h=5, w=4):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64) * scale + 2 * scale


def run(norm, x, names):
    if names is None:
        return norm(x)
    with use_domain(names):
        return norm(x)


# ---- slow definitions


def mix(norm, names=DOMAINS):
    """Mean and variance of a mixture of normal distributions with equal weight."""
    states = [norm.population_state(name) for name in names]
    mean = sum(state.running_mean for state in states) / len(states)
    var = sum(state.running_var + (state.running_mean - mean) ** 2 for state in states) / len(states)
    return mean, var


def average_affine(norm, names=DOMAINS):
    states = [norm.affine_state(name) for name in names]
    return [sum(getattr(state, field).detach() for state in states) / len(states) for field in ("weight", "bias")]


def join(source, image, share):
    """Two parts of a population, of which the second has a share."""
    mean = (1 - share) * source[0] + share * image[0]
    var = sum(w * (v + (m - mean) ** 2) for w, (m, v) in ((1 - share, source), (share, image)))
    return mean, var


def measure_shift(source, image, eps):
    """d^2, in units of a single image; see `bnext.layers.unseen`."""
    of_mean = ((image[0] - source[0]) ** 2 / (source[1] + eps)).mean() / NOISE_OF_MEAN
    of_var = (torch.log((image[1] + eps) / (source[1] + eps)) ** 2).mean() / NOISE_OF_LOG_VAR
    return float(of_mean + of_var) / 2


def find_share(source, image, eps, number=1):
    """1 - 1 / d^2, or 0."""
    return max(0.0, 1 - 1 / (number * measure_shift(source, image, eps)))


def measure_divergence(first, second, eps):
    """Of normal distributions, both ways, channel by channel."""
    total = 0.0
    for m, v, other_m, other_v in zip(*(field.tolist() for field in (*first, *second)), strict=True):
        v, other_v = v + eps, other_v + eps
        forth = math.log(math.sqrt(other_v / v)) + (v + (m - other_m) ** 2) / (2 * other_v) - 0.5
        back = math.log(math.sqrt(v / other_v)) + (other_v + (m - other_m) ** 2) / (2 * v) - 0.5
        total += forth + back
    return total


def find_nearest(norm, image):
    states = {name: norm.population_state(name) for name in DOMAINS}
    distances = {
        name: measure_divergence(image, (state.running_mean, state.running_var), norm.eps)
        for name, state in states.items()
    }
    return min(distances, key=distances.get)


def normalize_slowly(norm, image, rule, source_images=16):
    """One image of an unseen domain, [n, C, H, W]."""
    _, *own = reference.moments_of([image])
    source, affine = mix(norm), average_affine(norm)
    if rule == "nearest":
        return normalize_known(norm, image, find_nearest(norm, own))
    share = find_rule_share(norm, rule, source_images, source, own)
    return reference.inference_norm(image, *join(source, own, share), *affine, norm.eps)


def find_rule_share(norm, rule, source_images, source, own):
    if rule == "blend" and source_images == "auto":
        return find_share(source, own, norm.eps)
    return {"mixture": 0.0, "mini_batch": 1.0}.get(rule, 1 / (1 + source_images) if source_images != "auto" else 0.0)


def normalize_known(norm, image, name):
    state, affine = norm.population_state(name), norm.affine_state(name)
    vectors = state.running_mean, state.running_var, affine.weight.detach(), affine.bias.detach()
    return reference.inference_norm(image, *vectors, norm.eps)


RULES = [
    ("mixture", 16),
    ("mini_batch", 16),
    *(("blend", source_images) for source_images in (0, 2.5, 16, math.inf, "auto")),
    ("nearest", 16),
]
rules = pytest.mark.parametrize(("rule", "source_images"), RULES)


@rules
@given(seed=strategies.seeds)
@settings(max_examples=3, deadline=None)
def test_a_mixed_batch_by_every_rule_is_its_definition(rule, source_images, seed):
    norm, x = build(OWN.replace(unseen=rule, source_images=source_images), seed), draw(seed)
    with one_forward():
        output = run(norm, x, MIXED)
    for index, name in enumerate(MIXED):
        image = x[index : index + 1]
        is_known = name in DOMAINS
        expected = (
            normalize_known(norm, image, name) if is_known else normalize_slowly(norm, image, rule, source_images)
        )
        torch.testing.assert_close(output[index : index + 1], expected, **EXACT)
    with one_forward():
        torch.testing.assert_close(run(norm, x, "rain"), run(norm, x, None), rtol=0, atol=0)


@pytest.mark.parametrize("field", ["population", "affine"])
@pytest.mark.parametrize("rule", ["mixture", "mini_batch", "blend", "stream"])
def test_what_all_share_is_taken_as_it_is(field, rule):
    spec = OWN.replace(**{field: "shared"}, unseen=rule, source_images=0)
    norm, plain = build(spec), build(NormSpec())
    if field == "affine":
        weight, bias = norm.weight, norm.bias
        mean, var = mix(norm)
    else:
        weight, bias = average_affine(norm)
        mean, var = norm.running_mean, norm.running_var
    for name, value in {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}.items():
        getattr(plain, name).data.copy_(value)
    x = draw(n=1)
    expected = plain(x) if rule == "mixture" else plain.train()(x)
    torch.testing.assert_close(run(norm, x, "rain"), expected, **EXACT)


@pytest.mark.parametrize("rule", ["mixture", "mini_batch", "blend", "stream"])
@pytest.mark.parametrize("inference", ["population", "mini_batch"])
def test_norms_without_an_affine_normalize_alone(rule, inference):
    norms = [build(OWN.replace(affine=affine, unseen=rule, inference=inference)) for affine in ("none", "shared")]
    nn.init.ones_(norms[1].weight)
    nn.init.zeros_(norms[1].bias)
    norms[1].load_state_dict(norms[0].state_dict(), strict=False)
    for names in ("rain", MIXED):
        torch.testing.assert_close(*(run(norm, draw(), names) for norm in norms), **EXACT)


@rules
def test_the_rois_of_an_image_are_its_mini_batch(rule, source_images):
    norm, x = build(OWN.replace(unseen=rule, source_images=source_images)), draw(n=7, h=3, w=3)
    images = torch.tensor([0, 0, 0, 2, 2, 3, 3])  # the second has none
    names = ("rain",) * 3 + ("day",) * 2 + ("snow",) * 2
    with use_groups(norm, images, 4), one_forward():
        output = run(norm, x, names)
    for image, name in ((0, "rain"), (2, "day"), (3, "snow")):
        rois = x[images == image]
        is_known = name in DOMAINS
        expected = normalize_known(norm, rois, name) if is_known else normalize_slowly(norm, rois, rule, source_images)
        torch.testing.assert_close(output[images == image], expected, **EXACT)


@pytest.mark.parametrize("rule", ["mini_batch", "blend"])
def test_gradients_flow_through_the_image(rule):
    norm, x = build(OWN.replace(unseen=rule, source_images=1.5)), draw(n=2).requires_grad_()
    grad = draw(1, n=2)
    source, affine = mix(norm), average_affine(norm)
    share = 1.0 if rule == "mini_batch" else 1 / 2.5
    slow = []
    for image in x.split(1):
        own = image.mean((0, 2, 3)), image.var((0, 2, 3), correction=0)
        slow.append(reference.inference_norm(image, *join(source, own, share), *affine, norm.eps))
    (expected,) = torch.autograd.grad((torch.cat(slow) * grad).sum(), x)
    (found,) = torch.autograd.grad((run(norm, x, "rain") * grad).sum(), x)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("rule", ["mini_batch", "blend", "stream"])
def test_one_element_has_no_variance_and_gets_the_mixture(rule):
    norm, x = build(OWN.replace(unseen=rule)), draw(n=2, h=1, w=1)
    torch.testing.assert_close(run(norm, x[:1], "rain"), normalize_slowly(norm, x[:1], "mixture"), **EXACT)


def test_norms_of_mini_batches_take_unseen_ones_for_one_more_domain():
    norm, x = build(OWN.replace(inference="mini_batch", unseen="mixture")), draw()
    output, unseen = run(norm, x, MIXED), [index for index, name in enumerate(MIXED) if name not in DOMAINS]
    weight, bias = average_affine(norm)
    (expected,) = reference.concatenated_batch_norm([x[unseen]], [weight], [bias], norm.eps)
    torch.testing.assert_close(output[unseen].detach(), expected, **EXACT)


LEVEL_SPECS = {
    "pairs": OWN.replace(population="per_level_and_domain", affine="per_level_and_domain"),
    "domains": OWN,
    "levels_of_shared_affine": OWN.replace(population="per_level_and_domain", affine="shared"),
}


@pytest.mark.parametrize("spec", LEVEL_SPECS.values(), ids=LEVEL_SPECS)
@rules
def test_levels_in_a_mixed_batch(spec, rule, source_images):
    """Levels that share populations are one mini-batch of an image, and it is near to one domain at all levels."""
    spec = spec.replace(unseen=rule, source_images=source_images)
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).double()).eval()
    features = make_features(sizes=((3, 6, 5), (3, 3, 3), (3, 2, 1)))
    with one_forward(), use_domain(["rain", "day", "snow"]):
        outputs = norm(features)
    is_apart = spec.population == "per_level_and_domain"
    for index, active in enumerate(("rain", "day", "snow")):
        images = {level: x[index : index + 1] for level, x in features.items()}
        own = {}
        for level in LEVELS:
            own[level] = reference.moments_of([images[level]] if is_apart else list(images.values()))[1:]
        total = dict.fromkeys(DOMAINS, 0.0)
        for domain in DOMAINS:
            for level in LEVELS if is_apart else LEVELS[:1]:
                state = norm.population_state(f"{domain}_{level}")
                total[domain] += measure_divergence(own[level], (state.running_mean, state.running_var), norm.eps)
        for level in LEVELS:
            names = [f"{domain}_{level}" for domain in DOMAINS]
            known = active if active in DOMAINS else min(total, key=total.get) if rule == "nearest" else None
            source, affine = mix(norm, names), average_affine(norm, names)
            if known is not None:
                expected = normalize_known(norm, images[level], f"{known}_{level}")
            else:
                share = find_rule_share(norm, rule, source_images, source, own[level])
                expected = reference.inference_norm(images[level], *join(source, own[level], share), *affine, norm.eps)
            torch.testing.assert_close(outputs[level][index : index + 1], expected, **EXACT)


@pytest.mark.parametrize("rule", ["mixture", "mini_batch", "blend", "stream", "nearest"])
def test_levels_that_come_one_after_another(rule):
    """As all in one call; an image counts once, and is near to one domain: the one that the first level has found."""
    spec = OWN.replace(statistics="per_level_and_domain", population="per_level_and_domain", unseen=rule)
    norm = CycleBatchNormList(num_features=NUM_CHANNELS, levels=LEVELS, spec=spec).double().eval()
    together = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).double().eval()
    together.load_state_dict(randomize(norm).state_dict())
    features = make_features()
    with one_forward():
        for level in LEVELS:
            with use_level(level):
                output = norm(features[level])
            if rule != "nearest":
                with one_forward():
                    torch.testing.assert_close(output, together(features)[level], **EXACT)
            forget_stream(together)
    counts = take_unseen_counts(norm)
    assert sum(counts.values()) == 2
    if rule == "nearest":
        for index, (domain,) in enumerate(zip(counts, strict=False)):
            with use_domain(domain.taken), use_level(LEVELS[-1]):
                expected = norm(features[LEVELS[-1]])
            assert any(torch.equal(output[i], expected[i]) for i in range(2)), index


# ---- nearest


def make_pair(**answers):
    """Two norms, of which the second sees something else."""
    first, second = build(OWN.replace(unseen="nearest")), build(OWN.replace(unseen="nearest", **answers), 2)
    model = nn.Sequential(first, nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1).double(), second).eval()
    tell_forwards(model)
    return model


@pytest.mark.parametrize("population", ["per_domain", "shared"])
def test_the_nearest_is_found_once_in_a_forward(population):
    model, x = make_pair(population=population), draw(n=8)
    output = model(x)
    for index in range(len(x)):
        image = x[index : index + 1]
        name = find_nearest(model[0], reference.moments_of([image])[1:])
        with use_domain(name):
            torch.testing.assert_close(output[index : index + 1], model(image), **EXACT)
    counts = take_unseen_counts(model)
    assert sum(counts.values()) == 8
    assert {key.rule for key in counts} == {"nearest"}
    assert len({key.taken for key in counts}) > 1, "or any one would do"


def test_another_forward_finds_it_anew_and_a_broken_one_leaves_nothing():
    model, x = make_pair(), draw(n=1)
    far = model[0].population_state("fog")
    far.running_mean.fill_(100)
    expected = model(x)
    with pytest.raises(ValueError, match="features must be"):
        model(torch.zeros(1, NUM_CHANNELS + 1, 2, 2).double())
    torch.testing.assert_close(model(x + 100), copy.deepcopy(model)(x + 100), rtol=0, atol=0)
    assert {key.taken for key in take_unseen_counts(model)} > {"fog"}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_what_cannot_be_found_is_refused():
    model, x = make_pair(), draw()
    with pytest.raises(DomainError, match="one_forward"):
        model[0](x)
    with pytest.raises(DomainError, match="POPULATION"), one_forward():
        build(OWN.replace(unseen="nearest", population="shared"))(x)
    with pytest.raises(DomainError, match="POPULATION"), one_forward():
        build(OWN.replace(unseen="nearest", population="shared", affine="shared", inference="mini_batch"))(x)
    with one_forward():
        model[0](x)
        with pytest.raises(DomainError, match="6 images"):
            model[2](x[:2])


# ---- the stream


def follow(norm, image, source_images, state):
    """The statistics that normalize an image: those of the images so far, of which each one counts less and less."""
    new, now = reference.moments_of([image]), read_stream(norm, source_images, state)
    to_source, to_stream = (measure_divergence(new[1:], other, norm.eps) for other in (mix(norm), now))
    is_back = to_source < STREAM_RETURN * to_stream
    is_elsewhere = bool(state) and measure_shift(pool(state)[1:], new[1:], norm.eps) > STREAM_JUMP
    kept = [] if is_elsewhere else state
    state[:] = [] if is_back else [*kept, new]
    return read_stream(norm, source_images, state)


def read_stream(norm, source_images, state):
    if not state:
        return mix(norm)
    number, mean, var = pool(state)
    is_auto = source_images == "auto"
    auto = find_share(mix(norm), (mean, var), norm.eps, number) if is_auto else 0
    share = auto if is_auto else number / (number + source_images)
    return join(mix(norm), (mean, var), share)


def pool(state):
    """Number, mean and variance of the images of a stream, each of which counts less with every later one."""
    ages = range(len(state))[::-1]
    weights = [(1 - 1 / STREAM_MEMORY) ** age for age in ages]
    total = sum(w * count for w, (count, _, _) in zip(weights, state, strict=True))
    mean = sum(w * count * m for w, (count, m, _) in zip(weights, state, strict=True)) / total
    var = sum(w * count * (v + (m - mean) ** 2) for w, (count, m, v) in zip(weights, state, strict=True)) / total
    return sum(weights), mean, var


@pytest.mark.parametrize("source_images", [0, 4, "auto"])
def test_a_stream_follows_its_definition_and_begins_anew_when_it_is_told(source_images):
    norm = build(OWN.replace(unseen="stream", source_images=source_images))
    affine, seen, lengths = average_affine(norm), [], []
    for seed, shift in enumerate((4, 4, 4, 4, 9, 9, 0, 4)):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, NUM_CHANNELS, 5, 4, generator=generator, dtype=torch.float64)
        x = noise + shift
        expected = reference.inference_norm(x, *follow(norm, x, source_images, seen), *affine, norm.eps)
        torch.testing.assert_close(run(norm, x, "rain").detach(), expected, **EXACT)
        lengths.append(len(seen))
    assert lengths == [1, 2, 3, 4, 1, 2, 0, 1], "it is elsewhere at once, and back at the source"
    forget_stream(norm)
    first = reference.inference_norm(x, *follow(norm, x, source_images, []), *affine, norm.eps)
    torch.testing.assert_close(run(norm, x, None).detach(), first, **EXACT)
    assert "stream" not in str(norm.state_dict().keys())


def test_a_stream_does_not_go_further_than_its_bound():
    norm = build(OWN.replace(unseen="stream", source_images=0))
    mean, var = mix(norm)
    for x in (draw(0, n=1) * 1e6 + 1e9, draw(0, n=1) * 1e-9):
        forget_stream(norm)
        output = run(norm, x, None)
        seen = reference.moments_of([x])[1:]
        var_near = torch.minimum(
            torch.maximum(seen[1], (var + norm.eps) / STREAM_BOUND**2 - norm.eps), (var + norm.eps) * STREAM_BOUND**2
        )
        reach = STREAM_BOUND * (var + norm.eps).sqrt()
        mean_near = torch.minimum(torch.maximum(seen[0], mean - reach), mean + reach)
        expected = reference.inference_norm(x, mean_near, var_near, *average_affine(norm), norm.eps)
        torch.testing.assert_close(output.detach(), expected, rtol=1e-9, atol=1e-9)


def test_images_that_are_not_finite_and_frozen_statistics_move_no_stream():
    norm, x = build(OWN.replace(unseen="stream")), draw(n=1)
    first = run(norm, x, None)
    run(norm, x * float("nan"), None)
    with frozen_statistics(norm):
        run(norm, x + 5, None)
    forget = copy.deepcopy(norm)  # begins anew
    torch.testing.assert_close(run(forget, x, None), first, rtol=0, atol=0)
    with frozen_statistics(norm):
        torch.testing.assert_close(run(norm, x, None), first, rtol=0, atol=0)


# ---- another rule for a while, counts, and refusals


def test_a_rule_is_applied_for_a_while_and_leaves_the_stream_as_it_was():
    norm, x = build(OWN.replace(unseen="stream", source_images=2)), draw(n=1)
    plain = build(NormSpec())
    model = nn.ModuleList([norm, plain])
    run(norm, x, None)
    with frozen_statistics(norm):
        followed = run(norm, x, None)
    with pytest.raises(KeyError), applying_rule(model, "stream", source_images=2):
        run(norm, x + 9, {}["an error"])
    with applying_rule(model, "mini_batch"):
        torch.testing.assert_close(run(norm, x, "rain").detach(), normalize_slowly(norm, x, "mini_batch"), **EXACT)
    with applying_rule(model, "error"), pytest.raises(DomainError, match="'rain'"):
        run(norm, x, "rain")
    with frozen_statistics(norm):
        torch.testing.assert_close(run(norm, x, None), followed, rtol=0, atol=0)


def test_images_are_counted_by_domain_and_rule_once_in_a_forward():
    norm, x = build(OWN.replace(unseen="blend")), draw()
    with one_forward():
        run(norm, x, MIXED), run(norm, x, MIXED)
    run(norm, x[:1], None)
    with applying_rule(norm, "stream"):
        run(norm, x[:1], "rain")
    with applying_rule(norm, "fallback", fallback_domain="fog"):
        run(norm, x, "rain")
    counts = take_unseen_counts(nn.ModuleList([norm]))
    expected = {("rain", "blend", ""): 2, ("snow", "blend", ""): 1, (None, "blend", ""): 1, ("rain", "stream", ""): 1}
    assert counts == {**expected, ("rain", "fallback", "fog"): 6}
    assert not take_unseen_counts(norm)
    lines = describe_unseen({UnseenCount("rain", "stream"): 1, UnseenCount(None, "nearest", "day"): 3})
    assert "one image" in lines[0]
    assert "3 images without a domain" in lines[1]


@pytest.mark.parametrize("rule", ["mixture", "mini_batch", "blend", "stream", "nearest"])
def test_training_on_an_unseen_domain_is_an_error_with_any_rule(rule):
    norm = build(OWN.replace(unseen=rule)).train()
    for names in (None, "rain", MIXED):
        with pytest.raises(DomainError), one_forward():
            run(norm, draw(), names)


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ({"unseen": "guess"}, "unseen"),
        ({"unseen": "fallback"}, "unseen"),
        ({"fallback_domain": "rain"}, "fallback_domain"),
        ({"source_images": -1}, "source_images"),
        ({"source_images": float("nan")}, "source_images"),
        ({"source_images": "16"}, "source_images"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(answers, name):
    with pytest.raises(ConfigError, match=f"^{name} must"):
        OWN.replace(**answers)
    with pytest.raises(ConfigError, match="^unseen must"):
        NormSpec(unseen="mixture")


def test_a_fallback_domain_makes_the_rule_unless_another_is_named():
    assert OWN.replace(fallback_domain="fog").unseen == "fallback"
    assert OWN.replace(fallback_domain="fog").replace(unseen="error").unseen == "error"
    assert OWN.unseen == "error"

"""Every case in float64 against the slow definition: outputs, gradients of features and affine, buffers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnext.layers import BatchNorm2d, NormSpec
from tests import reference, strategies
from tests.cases import CASES, DOMAINS, NUM_CHANNELS, Case, find_owner, randomize

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 3


def kind_of(case, training):
    """What normalizes: "mini_batch", "population" or "renorm"."""
    if not training:
        return case.spec.inference
    return "population" if case.spec.has_frozen_statistics else case.spec.training


def expect_outputs(case, norm, inputs, training=True):
    """By the definition, for every sample on its own; differentiable in inputs and affine."""
    spec, domains = case.spec, case.domains_of(inputs)
    samples = [x for name in case.names for x in inputs[name]]
    affines = [(norm.affine_state(d).weight, norm.affine_state(d).bias) for d in domains]
    states = [norm.population_state(d) for d in domains]
    outputs = reference.normalize_samples(
        samples,
        case.mini_batches_of(inputs, training),
        affines if spec.affine != "none" else [None] * len(samples),
        [(s.running_mean.clone(), s.running_var.clone()) if spec.population != "none" else None for s in states],
        kind_of(case, training),
        eps=spec.eps,
        r_max=spec.r_max,
        d_max=spec.d_max,
    )
    sizes = [len(inputs[name]) for name in case.names]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return {
        name: torch.stack(outputs[start : start + size])
        for name, start, size in zip(case.names, starts, sizes, strict=True)
    }


def expect_populations(case, norm, inputs):
    """For each owner of population statistics: mean, variance and number of updates after a call in training."""
    spec = case.spec
    samples = [x for name in case.names for x in inputs[name]]
    sources = case.sources_of(inputs)
    found = {}
    for owner in case.owners_of(spec.population):
        state = norm.population_state(owner)
        values = (state.running_mean.clone(), state.running_var.clone(), int(state.num_batches_tracked))
        momentum = None if spec.average == "cumulative" else spec.momentum
        for unit in case.owners_of(spec.statistics):  # one update for each mini-batch, but for its groups
            mine = []
            for x, source in zip(samples, sources, strict=True):
                owners = [
                    find_owner(answer, *source, spec.level_groups) for answer in (spec.population, spec.statistics)
                ]
                mine += [x] if owners == [owner, unit] else []
            if not spec.has_frozen_statistics:
                values = reference.move_population(*values, mine, momentum)
        found[owner] = values
    return found


def actual_populations(case, norm, expected):
    states = {owner: norm.population_state(owner) for owner in expected}
    return {o: (s.running_mean.clone(), s.running_var.clone(), int(s.num_batches_tracked)) for o, s in states.items()}


def check_step(case, norm, inputs, grads):
    wanted = [*inputs.values(), *case.used_parameters(norm)]
    expected = expect_outputs(case, norm, inputs)
    populations = expect_populations(case, norm, inputs)
    right = torch.autograd.grad(list(expected.values()), wanted, list(grads.values()))
    outputs = case.call(norm, inputs)
    torch.testing.assert_close(outputs, expected, **EXACT)
    actual = torch.autograd.grad(list(outputs.values()), wanted, list(grads.values()))
    torch.testing.assert_close(actual, right, **EXACT)
    torch.testing.assert_close(actual_populations(case, norm, populations), populations, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_definition_over_several_steps(case):
    norm = case.build().train()
    for step in range(STEPS):
        check_step(case, norm, case.inputs(seed=step, requires_grad=True), case.inputs(seed=100 + step))


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_the_definition_and_moves_nothing(case):
    norm = case.build().eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    inputs, grads = case.inputs(requires_grad=True), list(case.inputs(seed=100).values())
    outputs, expected = case.call(norm, inputs), expect_outputs(case, norm, inputs, training=False)
    wanted = [*inputs.values(), *case.used_parameters(norm)]
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(list(outputs.values()), wanted, grads),
        torch.autograd.grad(list(expected.values()), wanted, grads),
        **EXACT,
    )
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@st.composite
def random_cases(draw):
    """Any answers that do not contradict one another, for domains with any composition of the batch."""
    sharing = st.sampled_from(["shared", "per_domain"])
    answers = {"statistics": draw(sharing), "population": draw(sharing), "affine": draw(sharing)}
    training = draw(st.sampled_from(["mini_batch", "renorm", "population"]))
    size = draw(st.none() | st.integers(1, 5)) if training != "population" else None
    spec = NormSpec(
        **answers,
        training=training,
        normalization_batch_size=size,
        average=draw(st.sampled_from(["moving", "cumulative"])),
        momentum=draw(st.floats(0.01, 1)),
        r_max=draw(st.floats(1, 3)),
        d_max=draw(st.floats(0, 3)),
        eps=draw(st.floats(1e-5, 0.1)),
        single_element="population",
        domains=DOMAINS if "per_domain" in answers.values() else (),
    )
    num_samples = draw(st.integers(1, 7))
    active = tuple(draw(st.lists(st.sampled_from(DOMAINS), min_size=num_samples, max_size=num_samples)))
    sides = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    return Case(spec, active=active if spec.domains else None), (num_samples, *sides)


@given(random_cases(), strategies.seeds, st.sampled_from([torch.contiguous_format, torch.channels_last]))
@settings(max_examples=120, deadline=None)
def test_any_answers_over_any_shapes_are_the_definition(drawn, seed, memory_format):
    case, (n, h, w) = drawn
    norm = case.build().train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        x = torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64) * 2 + 1
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        check_step(case, norm, {"x": x}, {"x": grad})


@pytest.mark.parametrize("training", ["mini_batch", "renorm"])
@pytest.mark.parametrize("num_samples", range(1, 9))
def test_every_normalization_batch_size_is_the_definition(num_samples, training):
    for size in range(1, num_samples + 2):
        case = Case(NormSpec(normalization_batch_size=size, training=training))
        x, grad = (torch.randn(num_samples, NUM_CHANNELS, 2, 2, dtype=torch.float64) + seed for seed in (0, 1))
        check_step(case, case.build().train(), {"x": x.requires_grad_()}, {"x": grad})


@given(strategies.seeds, st.tuples(*[st.integers(1, 5)] * 3))
@settings(max_examples=30, deadline=None)
def test_the_default_is_torchs_batch_norm_bit_by_bit(seed, sizes):
    n, h, w = sizes
    ours, torchs = BatchNorm2d(NUM_CHANNELS), nn.BatchNorm2d(NUM_CHANNELS)
    randomize(ours, seed % 1000)
    torchs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for training in (True, True, False):
        results = []
        x = torch.randn(n, NUM_CHANNELS, h + 1, w, generator=generator)
        for norm in (ours.train(training), torchs.train(training)):
            feature = x.clone().requires_grad_()
            output = norm(feature)
            wanted = [feature, norm.weight, norm.bias]
            results.append((output, *torch.autograd.grad(output.pow(3).sum(), wanted), *norm.state_dict().values()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"affine": "none"}, {"affine": False}),
        ({"population": "none", "inference": "mini_batch"}, {"track_running_stats": False}),
        ({"average": "cumulative"}, {"momentum": None}),
        ({"momentum": 0.7, "eps": 0.2}, {"momentum": 0.7, "eps": 0.2}),
        ({"normalization_batch_size": 64}, {}),
        ({"workers": "all"}, {}),
    ],
)
def test_torchs_own_options(changes, options):
    ours = BatchNorm2d(NUM_CHANNELS, NormSpec(**changes)).double()
    torchs = nn.BatchNorm2d(NUM_CHANNELS, **options).double()
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for step in range(STEPS):
        x = Case(ours.spec).inputs(step)["x"]
        torch.testing.assert_close(ours(x), torchs(x), **EXACT)
    torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()), **EXACT)
    x = Case(ours.spec).inputs(9)["x"]
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), **EXACT)


def test_frozen_both_is_detectron2s_frozen_batch_norm():
    frozen = pytest.importorskip("detectron2.layers").FrozenBatchNorm2d(NUM_CHANNELS).double()
    ours = BatchNorm2d(NUM_CHANNELS, NormSpec(frozen="both")).double()
    randomize(ours)
    frozen.load_state_dict(ours.state_dict(), strict=False)
    for training in (True, False):
        results = []
        for norm in (ours.train(training), frozen.train(training)):
            x = Case(ours.spec).inputs(requires_grad=True)["x"]
            output = norm(x)
            results.append((output, *torch.autograd.grad(output.pow(3).sum(), [x])))
        torch.testing.assert_close(*results, **EXACT)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert int(ours.num_batches_tracked) == 7

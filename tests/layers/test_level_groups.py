"""Levels that go together, between "shared" and "per_level": values, gradients, buffers, and state of other layouts."""

import copy

import pytest
import torch

from bnext.errors import ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, make_features, make_norm, randomize

GROUPS = (("p3", "p4"), ("p5",))
OWNERS = {"p3": "p3-p4", "p4": "p3-p4", "p5": "p5"}
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def grouped(groups=GROUPS, **answers):
    answers = {"statistics": "per_level", "population": "per_level", **answers}
    return NormSpec(**answers, level_groups=groups)


def train(norm, num_steps=3):
    """Outputs and all gradients of some steps."""
    results = []
    for step in range(num_steps):
        features = make_features(seed=step, requires_grad=True)
        outputs = norm.train()(features)
        wanted = [*features.values(), *norm.parameters()]
        results.append((outputs, torch.autograd.grad(list(outputs.values()), wanted, list(make_features(9).values()))))
    return results


@pytest.mark.parametrize("affine", ["shared", "per_level"])
@pytest.mark.parametrize("population", ["shared", "per_level"])
def test_a_group_is_a_mini_batch_and_a_population(affine, population):
    """Against the float64 definition, group by group."""
    norm = make_norm(grouped(affine=affine, population=population))
    for step in range(3):
        features = make_features(seed=step, requires_grad=True)
        before = {level: copy.deepcopy(norm.population_state(level)) for level in LEVELS}
        expected, moved = {}, {}
        for group in GROUPS:
            of_group = [features[level] for level in group]
            states = [norm.affine_state(level) for level in group]
            affines = [[state.weight for state in states], [state.bias for state in states]]
            expected.update(zip(group, reference.concatenated_batch_norm(of_group, *affines, 1e-5), strict=True))
            seen = [of_group] if population == "per_level" else [[features["p3"], features["p4"]], [features["p5"]]]
            seen = [[feature.detach() for feature in batch] for batch in seen]
            state = before[group[0]]
            statistics = reference.moving_average(state.running_mean, state.running_var, seen, 0.1)
            moved.update(dict.fromkeys(group, statistics))

        outputs = norm.train()(features)
        torch.testing.assert_close(outputs, expected, **EXACT)
        wanted, grads = [*features.values(), *norm.parameters()], list(make_features(7).values())
        torch.testing.assert_close(
            torch.autograd.grad(list(outputs.values()), wanted, grads),
            torch.autograd.grad(list(expected.values()), wanted, grads),
            **EXACT,
        )
        for level in LEVELS:
            state = norm.population_state(level)
            torch.testing.assert_close((state.running_mean, state.running_var), moved[level], **EXACT)


def test_the_ends_are_the_rows_of_the_paper():
    alone, together = grouped([[level] for level in LEVELS]), grouped([LEVELS])
    for spec, row in ((alone, 4), (together, 1)):
        norm, other = make_norm(spec), make_norm(NormSpec.from_table5_row(row), seed=2)
        other.load_state_dict(norm.state_dict())
        torch.testing.assert_close(train(norm), train(other), **EXACT)
        torch.testing.assert_close(norm.eval()(make_features(5)), other.eval()(make_features(5)), **EXACT)


def test_state_lies_under_the_names_of_groups_and_comes_back():
    norm, other = make_norm(grouped(affine="per_level")), make_norm(grouped(affine="per_level"), seed=2)
    owners = {key.rpartition(".")[0] for key in norm.state_dict()}
    assert owners == {"p3-p4", "p5"}
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other.population_state("p4").running_mean, norm.population_state("p3").running_mean)
    assert "level_groups" in repr(norm)


def test_levels_get_the_state_of_their_group():
    """As where all share it: what each level has for itself is not known."""
    norm, levels = make_norm(grouped(affine="per_level")), make_norm(NormSpec.from_table5_row(6), seed=2)
    levels.load_state_dict(norm.state_dict())
    for level, owner in OWNERS.items():
        for field in ("weight", "running_var"):
            assert torch.equal(getattr(levels.get_submodule(level), field), getattr(norm.get_submodule(owner), field))
    torch.testing.assert_close(levels.eval()(make_features()), norm.eval()(make_features()), **EXACT)


def test_groups_get_what_their_levels_had():
    levels, norm = make_norm(NormSpec.from_table5_row(4)), make_norm(grouped(), seed=2)
    norm.load_state_dict(levels.state_dict())
    assert torch.equal(norm.get_submodule("p5").running_var, levels.get_submodule("p5").running_var)
    means = [levels.get_submodule(level).running_mean for level in ("p3", "p4")]
    torch.testing.assert_close(norm.get_submodule("p3-p4").running_mean, sum(means) / 2, **EXACT)


def test_groups_of_a_domain_keep_their_names():
    answers = dict.fromkeys(("statistics", "population"), "per_level_and_domain")
    spec = NormSpec(**answers, domains=("day", "night"), level_groups=GROUPS)
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).double())
    assert set(dict(norm.named_children())) == {"day_p3-p4", "day_p5", "night_p3-p4", "night_p5"}
    apart = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec.replace(level_groups=())).double()
    apart.load_state_dict(norm.state_dict())
    assert torch.equal(apart.get_submodule("night_p4").running_mean, norm.get_submodule("night_p3-p4").running_mean)


@pytest.mark.parametrize(
    "groups",
    ["p3", ("p3", "p4"), 3, ((),), (("p3", "p4"), ("p4", "p5")), (("p3-p4", "p5"),), ((3, 4),), ((["p3"], "p4"),)],
)
def test_groups_that_are_none_are_refused(groups):
    with pytest.raises(ConfigError, match="level_groups"):
        grouped(groups)


def test_groups_without_effect_and_unknown_levels_are_refused():
    with pytest.raises(ConfigError, match="level_groups must be empty"):
        NormSpec(level_groups=GROUPS)
    with pytest.raises(ConfigError, match="'p9'"):
        LevelBatchNorm2d(NUM_CHANNELS, LEVELS, grouped((("p3", "p9"),)))


def test_groups_are_of_a_norms_build():
    norm = make_norm(grouped())
    with pytest.raises(ConfigError, match="level_groups"):
        norm.spec = norm.spec.replace(level_groups=(LEVELS,))


def test_a_level_of_the_name_of_a_group_is_refused():
    spec = NormSpec(statistics="per_level", population="per_level", level_groups=(("a", "b"),))
    with pytest.raises(ConfigError, match="a-b"):
        LevelBatchNorm2d(4, levels=("a", "b", "a-b"), spec=spec)

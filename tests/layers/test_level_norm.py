"""`LevelBatchNorm2d`: absent and empty levels, names, what it refuses, how it appears to others."""

import pytest
import torch
from torch import nn

from bnext.errors import ConfigError, StatisticsError
from bnext.layers import LevelBatchNorm2d, NormSpec, build_norm, name_norms
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm

KEYS = {
    "affine": {"weight", "bias"},
    "population": {"running_mean", "running_var", "num_batches_tracked"},
}


def row(number, **changes):
    return make_norm(NormSpec.from_table5_row(number).replace(**changes)).train()


@pytest.mark.parametrize("number", ROWS)
def test_state_dict_has_torchs_names_by_owner(number):
    spec = NormSpec.from_table5_row(number)
    expected = set()
    for axis, sharing in (("affine", spec.affine), ("population", spec.population)):
        owners = [""] if sharing == "shared" else [f"{level}." for level in LEVELS]
        expected |= {owner + key for owner in owners for key in KEYS[axis]}
    assert set(make_norm(spec).state_dict()) == expected


@pytest.mark.parametrize("number", ROWS)
def test_initial_state_is_torchs(number):
    norm = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, NormSpec.from_table5_row(number))
    fresh = nn.BatchNorm2d(NUM_CHANNELS).state_dict()
    assert all(torch.equal(value, fresh[key.rpartition(".")[2]]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("number", ROWS)
@pytest.mark.parametrize("training", [True, False])
def test_a_level_left_out_shifts_no_other(number, training):
    norm = row(number).train(training)
    features = make_features()
    part = {level: features[level] for level in ("p5", "p3")}
    before = {level: norm.population_state(level).running_mean.clone() for level in LEVELS}
    outputs = norm(part)
    assert list(outputs) == ["p5", "p3"]
    alone = LevelBatchNorm2d(NUM_CHANNELS, ("p3", "p5"), norm.spec).double().train(training)
    fresh = make_norm(norm.spec)
    alone.load_state_dict({key: v for key, v in fresh.state_dict().items() if not key.startswith("p4.")})
    expected = alone(part)
    assert all(torch.equal(outputs[level], expected[level]) for level in part)
    moved = {level for level in LEVELS if not torch.equal(norm.population_state(level).running_mean, before[level])}
    if not training:
        assert not moved
    elif norm.spec.population == "per_level":
        assert moved == {"p3", "p5"}


@pytest.mark.parametrize("number", ROWS)
def test_nothing_in_nothing_out(number):
    norm = row(number)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    assert norm({}) == {}
    empty = {level: torch.empty(0, NUM_CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True) for level in LEVELS}
    outputs = norm(empty)
    assert {level: output.shape for level, output in outputs.items()} == {level: x.shape for level, x in empty.items()}
    sum(output.sum() for output in outputs.values()).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in norm.parameters())
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("number", ROWS)
@pytest.mark.parametrize("training", [True, False])
def test_one_empty_level_is_as_if_it_were_absent(number, training):
    norm, other = row(number).train(training), row(number).train(training)
    features = make_features()
    with_empty = {**features, "p4": torch.empty(0, NUM_CHANNELS, 3, 3, dtype=torch.float64)}
    outputs = norm(with_empty)
    expected = other({level: features[level] for level in ("p3", "p5")})
    assert outputs["p4"].shape == (0, NUM_CHANNELS, 3, 3)
    for level, right in expected.items():
        torch.testing.assert_close(outputs[level], right, rtol=0, atol=1e-14)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=0, atol=1e-14)


def test_a_mini_batch_of_one_element_is_refused_by_layer_and_level():
    model = nn.ModuleDict({"tower": nn.Sequential(row(4))})
    name_norms(model)
    features = {**make_features(), "p5": torch.randn(1, NUM_CHANNELS, 1, 1).double()}
    with pytest.raises(StatisticsError, match=r"more than 1 element per channel.*\(tower\.0, p5\)"):
        model["tower"][0](features)
    model.eval()["tower"][0](features)


def test_a_single_element_is_fine_where_others_share_its_mini_batch():
    features = {**make_features(), "p5": torch.randn(1, NUM_CHANNELS, 1, 1).double()}
    for number in (1, 2):
        norm = row(number)
        before = norm.population_state("p5").running_mean.clone()
        assert torch.isfinite(norm(features)["p5"]).all()
        moved = not torch.equal(norm.population_state("p5").running_mean, before)
        assert moved == (norm.spec.population == "shared"), "one element has no variance to remember"


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (torch.zeros(1, NUM_CHANNELS, 2, 2), "mapping of level names to tensors; got Tensor"),
        ([torch.zeros(1, NUM_CHANNELS, 2, 2)], "mapping of level names to tensors; got list"),
        ({"p9": torch.zeros(1, NUM_CHANNELS, 2, 2)}, "features must be of the levels"),
        ({"p3": torch.zeros(1, NUM_CHANNELS + 1, 2, 2)}, rf"must be \[N, {NUM_CHANNELS}, H, W\]; got \[1, 5, 2, 2\]"),
        ({"p3": torch.zeros(NUM_CHANNELS, 2, 2)}, "H, W"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_features_are_refused_with_the_layers_path(features, text, training):
    model = nn.Sequential(LevelBatchNorm2d(NUM_CHANNELS, LEVELS)).train(training)
    name_norms(model)
    with pytest.raises(StatisticsError, match=text) as error:
        model(features)
    assert "(0" in str(error.value)


@pytest.mark.parametrize("levels", [(), ("p3", "p3"), ("p3", "weight"), ("a.b",), ("",), ("forward",)])
def test_level_names_that_cannot_be_are_refused(levels):
    with pytest.raises(ConfigError, match="levels (and domains )?must"):
        LevelBatchNorm2d(NUM_CHANNELS, levels)


def test_a_levels_state_is_not_to_be_called():
    with pytest.raises(RuntimeError, match="must not be called"):
        row(6).p3(torch.zeros(1, NUM_CHANNELS, 2, 2))


def test_build_norm_is_a_factory_for_any_number_of_channels():
    make = build_norm(NormSpec.from_table5_row(5), iter(LEVELS))
    for channels in (1, 3):
        norm = make(channels)
        assert norm.num_features == channels
        assert norm.levels == LEVELS
        assert norm.spec.table5_row == 5


@pytest.mark.parametrize("number", ROWS)
def test_repr_tells_the_answers(number):
    spec = NormSpec.from_table5_row(number, workers="all")
    text = repr(LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec))
    for answer in ("statistics", "population", "affine"):  # the default is not told
        assert (f"{answer}='per_level'" in text) == (getattr(spec, answer) == "per_level")
    assert "workers='all'" in text


@pytest.mark.parametrize("number", ROWS)
def test_momentum_and_eps_of_the_spec_are_used(number):
    norm, slow = row(number, momentum=1.0, eps=0.5), row(number, momentum=0.01, eps=0.5)
    features = make_features()
    outputs, same = norm(features), slow(features)
    assert all(torch.equal(outputs[level], same[level]) for level in LEVELS)
    loose = row(number, eps=1e-12)(features)
    assert all((outputs[level] - loose[level]).abs().max() > 1e-3 for level in LEVELS)
    if norm.spec.population == "per_level":
        for level in LEVELS:
            torch.testing.assert_close(norm.population_state(level).running_mean, features[level].mean((0, 2, 3)))

"""State of one norm in the form of another: exact where it can be, said where it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnext.errors import CheckpointError, ConfigError
from bnext.layers import LevelBatchNorm2d, NormSpec
from bnext.surgery import convert_norm, convert_norm_state, copy_norm_state
from tests import reference, strategies
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm, randomize


def row(number, seed=1):
    return make_norm(NormSpec.from_table5_row(number), seed=seed).eval()


class Tower(nn.Module):
    """A norm somewhere inside a model, and weights that are none of its business."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(2, NUM_CHANNELS, 1).double()
        self.subnet = nn.ModuleDict({"norm": norm})


def loses_affine(source, target):
    return source.spec.affine == "per_level" and target.spec.affine == "shared"


def loses_population(source, target):
    return source.spec.population == "per_level" and target.spec.population == "shared"


@pytest.mark.parametrize("to", ROWS)
@pytest.mark.parametrize("start", ROWS)
def test_every_row_loads_into_every_row(start, to):
    source, target = Tower(row(start)), Tower(row(to, seed=2)).eval()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    state, report = convert_norm_state(source.state_dict(), target)
    target.load_state_dict(state, strict=True)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert torch.equal(target.conv.weight, source.conv.weight)
    old, new = source.subnet["norm"], target.subnet["norm"]
    features = make_features()
    outputs, expected = new(features), old(features)
    exact = not loses_affine(old, new) and not loses_population(old, new)
    for level in LEVELS:
        same = torch.equal(outputs[level], expected[level])
        assert same if exact else not torch.allclose(outputs[level], expected[level])
    text = str(report)
    assert ("affines of the levels were averaged" in text) == loses_affine(old, new)
    assert ("merged into one" in text) == loses_population(old, new)
    copied = (old.spec.population, new.spec.population) == ("shared", "per_level")
    assert ("re-estimate them" in text) == (copied or loses_population(old, new))
    assert {change.path for change in report.changes} <= {"subnet.norm"}
    assert bool(report.changes) == (old.state_dict().keys() != new.state_dict().keys())


@pytest.mark.parametrize(("start", "to"), [(3, 4), (3, 6), (1, 2), (5, 6), (4, 6)])
def test_there_and_back_keeps_the_state(start, to):
    model = Tower(row(start))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    answers = [NormSpec.from_table5_row(number) for number in (to, start)]
    for spec in answers:
        convert_norm(model, statistics=spec.statistics, population=spec.population, affine=spec.affine)
        assert model.subnet["norm"].spec == spec
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=1e-14, atol=1e-14)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}


@given(strategies.seeds, st.sampled_from(ROWS), st.sampled_from(ROWS))
@settings(max_examples=25, deadline=None)
def test_lossless_conversion_there_and_back(seed, start, to):
    source, other = make_norm(NormSpec.from_table5_row(start), seed=seed), row(to)
    if loses_affine(source, other) or loses_population(source, other):
        return
    back = row(start, seed=3)
    copy_norm_state(source, other)
    copy_norm_state(other, back)
    torch.testing.assert_close(dict(back.state_dict()), dict(source.state_dict()), rtol=1e-13, atol=1e-13)


def test_merged_populations_and_averaged_affines_are_what_they_say():
    source, target = row(6), row(1, seed=2)
    copy_norm_state(source, target)
    states = [source.get_submodule(level) for level in LEVELS]
    torch.testing.assert_close(target.weight, sum(state.weight for state in states) / len(LEVELS))
    torch.testing.assert_close(target.bias, sum(state.bias for state in states) / len(LEVELS))
    # Two elements at mean +- standard deviation have these very moments: their union is the merge.
    stand_ins = [
        torch.stack([s.running_mean - s.running_var.sqrt(), s.running_mean + s.running_var.sqrt()])[:, :, None, None]
        for s in states
    ]
    _, mean, var = reference.moments_of(stand_ins)
    torch.testing.assert_close(target.running_mean, mean)
    torch.testing.assert_close(target.running_var, var)
    assert int(target.num_batches_tracked) == 7


@pytest.mark.parametrize("number", ROWS)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_torchs_batch_norms_load_exactly(kind, number):
    source = randomize(kind(NUM_CHANNELS).double()).eval()
    target = row(number, seed=2)
    report = copy_norm_state(source, target, "head.norm")
    features = make_features()
    outputs = target(features)
    for level, feature in features.items():
        expected = nn.functional.batch_norm(
            feature, source.running_mean, source.running_var, source.weight, source.bias, eps=source.eps
        )
        torch.testing.assert_close(outputs[level], expected, rtol=0, atol=0)
    assert {change.path for change in report.changes} <= {"head.norm"}
    assert ("re-estimate" in str(report)) == (target.spec.population == "per_level")


@pytest.mark.parametrize("number", ROWS)
def test_detectron2s_cycling_norm_loads(number):
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    source = randomize(cycling(len(LEVELS), bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS).double()).eval()
    target = row(number, seed=2)
    report = copy_norm_state(source, target)
    features = make_features()
    outputs = target(features)
    expected = {level: source(feature) for level, feature in features.items()}
    assert "numbered levels were read in the order p3, p4, p5" in str(report)
    if target.spec.population == "per_level":
        torch.testing.assert_close(outputs, expected, rtol=1e-13, atol=1e-13)
    else:
        assert "merged into one" in str(report)


@pytest.mark.parametrize("number", ROWS)
@pytest.mark.parametrize("length", [2, 4])
def test_wrong_number_of_levels(number, length):
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    source = cycling(length, bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS)
    target = Tower(row(number))
    state = {f"subnet.norm.{key}": value for key, value in source.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=rf"the 3 levels of the model; got {length} \(subnet\.norm\).*IN_FEATURES"
    ):
        convert_norm_state(state, target)


@pytest.mark.parametrize("number", ROWS)
def test_state_without_statistics_is_reported(number):
    target = row(number)
    state, report = convert_norm_state(nn.GroupNorm(2, NUM_CHANNELS).state_dict(), target)
    result = target.load_state_dict(state, strict=False)
    assert "holds no population statistics for" in str(report)
    assert not result.unexpected_keys
    assert all("running" in key or "num_batches" in key for key in result.missing_keys)


@pytest.mark.parametrize("number", ROWS)
def test_norm_without_affine_is_reported(number):
    target = row(number)
    report = copy_norm_state(nn.BatchNorm2d(NUM_CHANNELS, affine=False).double(), target)
    assert "the source has no affine, so weight 1 and bias 0 were set" in str(report)
    for name, parameter in target.named_parameters():
        assert bool((parameter == float(name.endswith("weight"))).all())


@pytest.mark.parametrize("number", ROWS)
def test_state_without_affine_is_reported(number):
    """A state dict does not say whether its norm had none, or it was left out."""
    target = row(number)
    state, report = convert_norm_state(nn.BatchNorm2d(NUM_CHANNELS, affine=False).double().state_dict(), target)
    assert "holds no affine for" in str(report)
    assert not any(key.endswith(("weight", "bias")) for key in state)


@pytest.mark.parametrize("number", ROWS)
@pytest.mark.parametrize("key", ["running_average", "p3.deep.weight", "weight_v"])
def test_unknown_keys_are_refused(number, key):
    state = {f"subnet.norm.{key}": torch.zeros(NUM_CHANNELS)}
    with pytest.raises(CheckpointError, match=r"of torch's names.*subnet\.norm"):
        convert_norm_state(state, Tower(row(number)))


@pytest.mark.parametrize("number", ROWS)
def test_a_convolution_in_the_place_of_a_norm_is_left_out_and_said(number):
    """A head without norms, as of detectron2's model zoo, has convolutions where another has norms."""
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 3)
    state = {f"subnet.norm.{key}": value for key, value in conv.state_dict().items()}
    converted, report = convert_norm_state({**state, "conv.bias": torch.ones(1)}, Tower(row(number)))
    assert converted.keys() == {"conv.bias"}
    assert "convolution in the place of the norm" in str(report)


@pytest.mark.parametrize("number", ROWS)
def test_state_of_other_channels_is_refused(number):
    state = {"subnet.norm.weight": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"shape \[4\]; got \[7\] \(subnet\.norm, 'weight'\)"):
        convert_norm_state(state, Tower(row(number)))


@pytest.mark.parametrize("number", [2, 3, 5, 6])
def test_a_level_that_the_model_has_not_is_reported(number):
    more = LevelBatchNorm2d(NUM_CHANNELS, ("p2", *LEVELS), NormSpec.from_table5_row(6)).double()
    report = copy_norm_state(more, row(number))
    assert "p2" in str(report)


def test_a_level_that_the_checkpoint_has_not_is_reported_and_kept():
    fewer = randomize(LevelBatchNorm2d(NUM_CHANNELS, LEVELS[:2], NormSpec.from_table5_row(6)).double())
    target, untouched = row(6, seed=2), row(6, seed=2)
    report = copy_norm_state(fewer, target)
    assert "no population statistics for p5" in str(report)
    assert "no affine for p5" in str(report)
    for key, value in target.state_dict().items():
        expected = untouched if key.startswith("p5") else fewer
        assert torch.equal(value, expected.state_dict()[key])


def test_old_checkpoints_without_a_counter_load():
    source = {key: value for key, value in row(3).state_dict().items() if key != "num_batches_tracked"}
    for number in ROWS:
        target = row(number, seed=2)
        state, _ = convert_norm_state(source, target)
        result = target.load_state_dict(state, strict=False)
        assert not result.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
        for level in LEVELS:
            assert torch.equal(target.population_state(level).running_mean, source["running_mean"])


def test_nothing_to_convert_says_so():
    model = Tower(row(4))
    state, report = convert_norm_state(model.state_dict(), model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()
    assert str(report) == "Norm state needed no conversion."
    foreign, report = convert_norm_state({"stem.weight": torch.zeros(1)}, model)
    assert list(foreign) == ["stem.weight"]
    assert not report.changes


def test_levels_of_a_conversion_do_not_share_memory():
    target = row(6)
    copy_norm_state(row(3), target)
    state, _ = convert_norm_state(row(3).state_dict(), target)
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("training", [True, False])
def test_convert_norm_keeps_mode_type_path_and_freezing(training):
    model = Tower(row(3)).train(training)
    model.subnet["norm"].path = "subnet.norm"
    model.subnet["norm"].requires_grad_(False)
    convert_norm(model, population="per_level", workers="all")
    norm = model.subnet["norm"]
    assert all(module.training == training for module in norm.modules())
    assert norm.path == "subnet.norm"
    assert norm.spec == NormSpec.from_table5_row(4, workers="all")
    assert {value.dtype for value in norm.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_convert_norm_of_a_bare_norm_is_refused():
    norm = row(3)
    with pytest.raises(ConfigError, match="copy_norm_state"):
        convert_norm(norm, population="per_level")
    assert norm.spec.table5_row == 3


def test_a_norm_at_two_places_stays_one():
    norm = row(3)
    model = nn.ModuleDict({"a": norm, "b": nn.ModuleDict({"c": norm})})
    convert_norm(model, population="per_level")
    assert model["a"] is model["b"]["c"]
    assert model["a"].spec.table5_row == 4


def test_a_model_without_level_norms_has_nothing_to_convert():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match="must have a level norm to convert; got Sequential"):
        convert_norm(model, population="per_level")

"""State of one norm in the form of another, both ways: exact where it can be, said where it cannot."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnext.errors import CheckpointError, ConfigError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.forms import find_form
from bnext.surgery import convert_norm_state, copy_norm_state
from tests import reference, strategies
from tests.cases import LEVELS, NUM_CHANNELS, ROWS, make_features, make_norm, randomize
from tests.surgery.norm_forms import FORMS, LAYOUTS, call, make, pick_pairs

LOSSES = ("left out", "averaged", "merged")


def row(number, seed=1):
    return make_norm(NormSpec.from_table5_row(number), seed=seed).eval()


class Tower(nn.Module):
    """A norm somewhere inside a model, and weights that are none of its business."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(2, NUM_CHANNELS, 1).double()
        self.subnet = nn.ModuleDict({"norm": norm})


def are_close(one, other, tolerance=1e-12):
    return all(torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in LEVELS)


# ---- every layout into every other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_kept_exactly_where_the_report_says_so(layout):
    for start, to in pick_pairs(layout):
        other_eps = find_form(make(start)).eps != find_form(make(to)).eps
        for adopt_eps in (False, True)[: 1 + other_eps]:
            source, target = make(start), make(to, seed=2)
            by_batch = {find_form(norm).inference[0] for norm in (source, target)} == {"mini_batch"}
            before = copy.deepcopy(source.state_dict())
            expected = call(source)
            report = copy_norm_state(source, target, "norm", adopt_eps=adopt_eps)
            are_kept = are_close(call(target), expected)
            # Whose samples make a mini-batch does not show where each call is of one domain.
            assert are_kept == report.keeps_outputs or (by_batch and are_kept), f"{start}, {to}, {adopt_eps}: {report}"
            assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items() if key in before)


@given(st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(FORMS)), strategies.seeds)
@settings(max_examples=150, deadline=None)
def test_there_and_back_keeps_the_state_dict(start, other, seed):
    source, middle, back = make(start, seed), make(other, seed=2), make(start, seed=3)
    there = str(copy_norm_state(source, middle, "norm"))
    copy_norm_state(middle, back, "norm")
    lost = {
        "num_batches_tracked": "num_batches_tracked was left out",
        "weight": "affine",
        "bias": "affine",
        "running_mean": "population statistics",
        "running_var": "population statistics",
    }
    losing = [line for line in there.splitlines() if any(word in line for word in LOSSES)]
    for key, value in source.state_dict().items():
        what = lost[key.rpartition(".")[2]]
        if any(what in line or "population statistics" in line and "num" in key for line in losing):
            continue
        owner = key.rpartition(".")[0]  # that the other does not know, as a level is no domain
        if owner and any("state of" in line and owner in line for line in losing):
            continue
        assert torch.equal(back.state_dict()[key], value), f"{key}: {there}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_becomes_that_of_every_norm_of_bnext(layout):
    """As `copy_norm_state` does, from the keys alone."""
    for start, to in pick_pairs(layout):
        if not to.startswith(("own", "domains", "levels")):
            continue
        source = nn.ModuleDict({"norm": make(start)})
        target, other = nn.ModuleDict({"norm": make(to, seed=2)}), make(to, seed=2)
        state, report = convert_norm_state(source.state_dict(), target)
        result = target.load_state_dict(state, strict=False)
        assert not result.unexpected_keys, (start, to)
        copied = copy_norm_state(source["norm"], other)
        for key, value in other.state_dict().items():
            if f"norm.{key}" in state or "no affine" not in str(copied):
                assert torch.equal(target["norm"].state_dict()[key], value), f"{start}, {to}, {key}: {report}"


@pytest.mark.parametrize("to", [3, 4, 5, 6])
@pytest.mark.parametrize("start", [3, 4, 5, 6])
def test_every_row_loads_into_every_row(start, to):
    source, target = Tower(row(start)), Tower(row(to, seed=2)).eval()
    before = copy.deepcopy(source.state_dict())
    state, report = convert_norm_state(source.state_dict(), target)
    target.load_state_dict(state, strict=True)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert torch.equal(target.conv.weight, source.conv.weight)

    old, new = source.subnet["norm"], target.subnet["norm"]
    loses_affine = (old.spec.affine, new.spec.affine) == ("per_level", "shared")
    loses_population = (old.spec.population, new.spec.population) == ("per_level", "shared")
    outputs, expected = new(make_features()), old(make_features())
    for level in LEVELS:
        is_same = torch.equal(outputs[level], expected[level])
        assert (
            is_same if not (loses_affine or loses_population) else not torch.allclose(outputs[level], expected[level])
        )
    assert ("averaged" in str(report)) == loses_affine
    assert ("merged into one" in str(report)) == loses_population
    assert {change.path for change in report.changes} <= {"subnet.norm"}
    assert bool(report.changes) == (old.state_dict().keys() != new.state_dict().keys())


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


# ---- state of torch and detectron2 into levels


@pytest.mark.parametrize("number", ROWS)
def test_torchs_batch_norms_load_exactly(number):
    source = make("torch")
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


@pytest.mark.parametrize("length", [2, 4])
def test_wrong_number_of_levels(length):
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    source = cycling(length, bn_class=nn.BatchNorm2d, num_features=NUM_CHANNELS)
    target = Tower(row(4))
    state = {f"subnet.norm.{key}": value for key, value in source.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"got {length} \(subnet\.norm\)"):
        convert_norm_state(state, target)


@pytest.mark.parametrize("number", [3, 6])
def test_state_without_statistics_is_reported(number):
    target = row(number)
    state, report = convert_norm_state(nn.GroupNorm(2, NUM_CHANNELS).state_dict(), target)
    result = target.load_state_dict(state, strict=False)
    assert "holds no population statistics for" in str(report)
    assert not result.unexpected_keys
    assert all("running" in key or "num_batches" in key for key in result.missing_keys)


@pytest.mark.parametrize("number", [3, 6])
def test_norm_without_affine_is_reported(number):
    target = row(number)
    report = copy_norm_state(nn.BatchNorm2d(NUM_CHANNELS, affine=False).double(), target)
    assert "the source has no affine, so weight 1 and bias 0 were set" in str(report)
    for name, parameter in target.named_parameters():
        assert bool((parameter == float(name.endswith("weight"))).all())


@pytest.mark.parametrize("number", [3, 6])
def test_state_without_affine_is_reported(number):
    """A state dict does not say whether its norm had none, or it was left out."""
    target = row(number)
    state, report = convert_norm_state(nn.BatchNorm2d(NUM_CHANNELS, affine=False).double().state_dict(), target)
    assert "holds no affine for" in str(report)
    assert not any(key.endswith(("weight", "bias")) for key in state)


@pytest.mark.parametrize("key", ["running_average", "p3.deep.weight", "weight_v"])
def test_unknown_keys_are_refused(key):
    state = {f"subnet.norm.{key}": torch.zeros(NUM_CHANNELS)}
    with pytest.raises(CheckpointError, match=r"subnet\.norm"):
        convert_norm_state(state, Tower(row(6)))


def test_a_convolution_in_the_place_of_a_norm_is_left_out_and_said():
    """A head without norms, as of detectron2's model zoo, has convolutions where another has norms."""
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 3)
    state = {f"subnet.norm.{key}": value for key, value in conv.state_dict().items()}
    converted, report = convert_norm_state({**state, "conv.bias": torch.ones(1)}, Tower(row(6)))
    assert converted.keys() == {"conv.bias"}
    assert "convolution in the place of the norm" in str(report)


def test_state_of_other_channels_is_refused():
    state = {"subnet.norm.weight": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"\[7\] \(subnet\.norm\)"):
        convert_norm_state(state, Tower(row(6)))


@pytest.mark.parametrize("number", [3, 6])
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
    assert str(report) == "Norm state of the checkpoint: nothing was lost."
    foreign, report = convert_norm_state({"stem.weight": torch.zeros(1)}, model)
    assert list(foreign) == ["stem.weight"]
    assert not report.changes


def test_levels_of_a_conversion_do_not_share_memory():
    target = row(6)
    copy_norm_state(row(3), target)
    state, _ = convert_norm_state(row(3).state_dict(), target)
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)


# ---- names of domains


def test_a_state_dict_of_domains_loads_into_plain_norms_too():
    """The way back: a model of torch's norms reads a checkpoint of named domains."""
    source, target = nn.ModuleDict({"norm": make("domains_DDD")}), nn.ModuleDict({"norm": make("torch", seed=2)})
    state, report = convert_norm_state(source.state_dict(), target, domain_map={"": "p4"})
    target.load_state_dict(state, strict=True)
    torch.testing.assert_close(call(target["norm"])["p4"], call(source["norm"])["p4"])
    assert "what is shared was taken from p4" in str(report)
    assert "p3, p5 was left out" in str(report)
    _, report = convert_norm_state(source.state_dict(), target)
    assert "averaged" in str(report)


def test_plain_norms_are_left_to_torch():
    model = nn.ModuleDict({"norm": make("torch")})
    state = {"norm.weight": torch.zeros(2, 2, 1, 1), "norm.odd": torch.zeros(1)}
    converted, report = convert_norm_state(state, model)
    assert converted == state
    assert not report.changes


def test_domains_can_be_renamed_and_started_from_another():
    source = make("domains_DDD")
    spec = source.spec.replace(domains=("day", "night", "dusk"))
    target = randomize(BatchNorm2d(NUM_CHANNELS, spec).double(), 2).eval()
    report = copy_norm_state(source, target, domain_map={"day": "p3", "night": "p4", "dusk": "p4"})
    for name, origin in (("day", "p3"), ("night", "p4"), ("dusk", "p4")):
        for key, value in source.get_submodule(origin).state_dict().items():
            assert torch.equal(target.get_submodule(name).state_dict()[key], value)
    assert "p5 was left out" in str(report)
    assert not report.keeps_outputs
    copy_norm_state(make("torch"), target, domain_map={"dusk": ""})
    assert torch.equal(target.get_submodule("dusk").running_mean, make("torch").running_mean)


@pytest.mark.parametrize("mapping", [{"day": "p3"}, {"p3": "day"}, {"": "day"}])
def test_unknown_names_in_a_map_are_refused(mapping):
    with pytest.raises(ConfigError, match="domain_map"):
        copy_norm_state(make("domains_DDD"), make("domains_DDD"), domain_map=mapping)


def test_numbered_levels_need_as_many_names():
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    four = cycling(4, num_features=NUM_CHANNELS).double()
    for source, target in ((four, make("domains_SDS")), (make("domains_SDS"), four)):
        with pytest.raises(CheckpointError, match="numbered"):
            copy_norm_state(source, target)


# ---- what normalizes, eps and types


def test_unknown_statistics_change_nothing_where_the_mini_batch_normalizes():
    report = copy_norm_state(make("own_no_population"), make("own_by_batch"))
    assert "holds no population statistics" in str(report)
    assert report.keeps_outputs


def test_mini_batches_of_other_domains_are_other_mini_batches():
    source = make("domains_DNS")
    target = randomize(BatchNorm2d(NUM_CHANNELS, source.spec.replace(domains=("day", "night"))).double())
    report = copy_norm_state(source, target)
    assert "('p3', 'p4', 'p5'), and now is by mini_batch per_domain ('day', 'night')" in str(report)
    assert not report.keeps_outputs


def test_zero_eps_is_taken_over_as_next_to_nothing():
    """torchvision's published detectors have frozen norms with eps 0 (pytorch/vision#2599)."""
    source, target = make("torchvision_frozen_no_eps"), make("own_frozen", seed=2)
    source.running_var[0] = 1e-9
    report = copy_norm_state(source, target, adopt_eps=True)
    assert report.keeps_outputs
    assert target.spec.eps == target.eps == 1e-30
    assert are_close(call(target), call(source))
    report = copy_norm_state(source, make("own_frozen"))
    assert "eps is 1e-05, but was 0.0; outputs change" in str(report)
    assert not report.keeps_outputs


def test_adopted_eps_is_on_every_part():
    target = make("domains_DDD")
    copy_norm_state(make("torch_other_eps"), target, adopt_eps=True)
    assert {module.eps for module in target.modules()} == {target.spec.eps} == {1e-2}


def test_rounding_to_another_type_is_said():
    source, target = make("own"), make("own", seed=2).half()
    assert "state of torch.float64 was rounded to torch.float16" in str(copy_norm_state(source, target))
    assert copy_norm_state(target, make("own")).keeps_outputs


def test_other_channels_and_unknown_modules_are_refused():
    with pytest.raises(CheckpointError, match="channels.*stem"):
        copy_norm_state(nn.BatchNorm2d(8), make("own"), "stem")
    with pytest.raises(CheckpointError, match="channels"):
        copy_norm_state(LevelBatchNorm2d(3, LEVELS, NormSpec.from_table5_row(6)), make("levels_row6"))
    for pair in ((nn.Linear(4, 4), make("own")), (make("own"), nn.ModuleList([nn.BatchNorm2d(4)]))):
        with pytest.raises(ConfigError, match="Linear|ModuleList"):
            copy_norm_state(*pair)


class Bounded(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).clamp(-9, 9)


def test_a_class_with_a_forward_of_its_own_is_treated_as_the_caller_says():
    source, target = randomize(Bounded(NUM_CHANNELS).double()).eval(), make("own", seed=2)
    with pytest.raises(ConfigError, match="Bounded.*treat_as"):
        copy_norm_state(source, target)
    with pytest.raises(ConfigError, match="Bounded.*treat_as"):
        copy_norm_state(target, source)
    assert copy_norm_state(source, target, treat_as={Bounded: nn.BatchNorm2d}).keeps_outputs
    assert torch.equal(target.running_var, source.running_var)

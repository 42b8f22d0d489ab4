"""Every form of norm into every other, there and back: what is said to be kept is kept, and nothing else."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnext.errors import CheckpointError, ConfigError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.forms import find_form, find_forms, find_leftovers
from bnext.surgery import convert_norm_state, copy_norm_state
from bnext.surgery.caffe import read_caffe_state
from tests import strategies
from tests.cases import LEVELS, NUM_CHANNELS, make_features, randomize
from tests.surgery.norm_forms import FORMS, call, make

LOSSES = ("left out", "averaged", "merged")


def are_close(one, other, tolerance=1e-12):
    return all(torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in LEVELS)


@pytest.mark.parametrize("start", FORMS)
def test_outputs_are_kept_exactly_where_the_report_says_so(start):
    for to in FORMS:
        other_eps = find_form(make(start)).eps != find_form(make(to)).eps
        for adopt_eps in (False, True)[: 1 + other_eps]:
            source, target = make(start), make(to, seed=2)
            by_batch = {find_form(norm).inference[0] for norm in (source, target)} == {"mini_batch"}
            before = copy.deepcopy(source.state_dict())
            expected = call(source)
            report = copy_norm_state(source, target, "norm", adopt_eps=adopt_eps)
            are_kept = are_close(call(target), expected)
            # Whose samples make a mini-batch does not show where each call is of one domain.
            assert are_kept == report.keeps_outputs or (by_batch and are_kept), f"{to}, {adopt_eps}: {report}"
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
        assert torch.equal(back.state_dict()[key], value), f"{key}: {there}"


@pytest.mark.parametrize("start", FORMS)
def test_a_state_dict_becomes_that_of_every_norm_of_bnext(start):
    """As `copy_norm_state` does, from the keys alone."""
    source = nn.ModuleDict({"norm": make(start)})
    for to in (name for name in FORMS if name.startswith(("own", "domains", "levels"))):
        target, other = nn.ModuleDict({"norm": make(to, seed=2)}), make(to, seed=2)
        state, report = convert_norm_state(source.state_dict(), target)
        result = target.load_state_dict(state, strict=False)
        assert not result.unexpected_keys, to
        copied = copy_norm_state(source["norm"], other)
        for key, value in other.state_dict().items():
            if f"norm.{key}" in state or "no affine" not in str(copied):
                assert torch.equal(target["norm"].state_dict()[key], value), f"{to} {key}: {report}"


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
    with pytest.raises(ConfigError, match=r"domain_map must map names of the target.*'p5'.*Correct the name"):
        copy_norm_state(make("domains_DDD"), make("domains_DDD"), domain_map=mapping)


def test_numbered_levels_need_as_many_names():
    cycling = pytest.importorskip("detectron2.layers").CycleBatchNormList
    four = cycling(4, num_features=NUM_CHANNELS).double()
    for source, target in ((four, make("domains_SDS")), (make("domains_SDS"), four)):
        with pytest.raises(CheckpointError, match=r"numbered .* must be as many as the [34] .*got [34]"):
            copy_norm_state(source, target)


def test_unknown_statistics_change_nothing_where_the_mini_batch_normalizes():
    report = copy_norm_state(make("own_no_population"), make("own_by_batch"))
    assert "holds no population statistics" in str(report)
    assert report.keeps_outputs


def test_mini_batches_of_other_domains_are_other_mini_batches():
    source = make("domains_DNS")
    target = randomize(BatchNorm2d(NUM_CHANNELS, source.spec.replace(domains=("day", "night"))).double())
    report = copy_norm_state(source, target)
    assert "('per_domain', ('p3', 'p4', 'p5')), and now is by mini-batch ('per_domain', ('day', 'night'))" in str(
        report
    )
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
    with pytest.raises(CheckpointError, match=r"must have the 4 channels of the target; got 8 \(stem\)"):
        copy_norm_state(nn.BatchNorm2d(8), make("own"), "stem")
    for pair in ((nn.Linear(4, 4), make("own")), (make("own"), nn.ModuleList([nn.BatchNorm2d(4)]))):
        with pytest.raises(ConfigError, match="must be of a known form; got (Linear|ModuleList)"):
            copy_norm_state(*pair)


@pytest.mark.parametrize("name", FORMS)
def test_the_form_says_the_keys_and_nothing_is_left_over(name):
    norm = make(name)
    form = find_form(norm)
    assert set(form.list_keys()) == set(norm.state_dict())
    refused, notes = find_leftovers(norm, form)
    assert not refused
    if name == "detectron2_naive_sync":
        assert "_stats_mode" in notes[1]
        assert "NaiveSyncBatchNorm does otherwise than torch in training" in notes[0]
    else:
        assert not notes
    model = nn.ModuleDict({"a": nn.ModuleDict({"norm": norm}), "b": nn.ModuleDict({"norm": norm})})
    assert [path for path, *_ in find_forms(model)] == ["a.norm", "b.norm"]


def test_lists_whose_items_are_called_are_no_norm():
    lists = nn.ModuleDict({"norms": nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))})
    assert [path for path, *_ in find_forms(lists)] == ["norms.0", "norms.1"]


# Caffe's conventions


def make_caffe_state(inverse, scale):
    norm = make("torch")
    state = norm.state_dict()
    var = (state["running_var"] + 1e-5).rsqrt() if inverse else state["running_var"]
    found = {"running_mean": state["running_mean"] * scale, "running_var": var * scale, "weight": state["weight"]}
    return norm, {**found, "bias": state["bias"], "scale_factor": torch.tensor([scale], dtype=torch.float64)}


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("scale", [1.0, 999.98])
@pytest.mark.parametrize("prefix", ["", "stem.norm."])
def test_state_of_caffe_is_read(inverse, scale, prefix):
    norm, found = make_caffe_state(inverse, scale)
    state = read_caffe_state({prefix + key: value for key, value in found.items()}, holds_inverse_std=inverse, eps=1e-5)
    target = make("own", seed=2)
    target.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, strict=False)
    assert state.keys() == {prefix + key for key in ("running_mean", "running_var", "weight", "bias")}
    assert are_close(call(target), call(norm))


def test_a_variance_of_zero_survives_its_inverse_root():
    inverse = torch.zeros(NUM_CHANNELS).add(1e-5).rsqrt()
    state = read_caffe_state({"running_var": inverse}, holds_inverse_std=True, eps=1e-5)
    assert bool((state["running_var"] >= 0).all())
    torch.testing.assert_close(state["running_var"], torch.zeros(NUM_CHANNELS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [1e3, 0.0, -1.0, float("nan")])
def test_what_is_no_inverse_root_is_refused(value):
    found = {"norm.running_var": torch.tensor([1.0, value])}
    with pytest.raises(CheckpointError, match=r"running_var must hold 1 / sqrt.*channel 1.*holds_inverse_std=False"):
        read_caffe_state(found, holds_inverse_std=True, eps=1e-5)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_norm_of_caffe_that_was_never_trained_is_refused(factor):
    found = {"norm.running_mean": torch.zeros(2), "norm.scale_factor": torch.tensor([factor])}
    with pytest.raises(CheckpointError, match=r"norm.scale_factor must be above 0"):
        read_caffe_state(found, holds_inverse_std=False, eps=1e-5)


def test_levels_of_one_channel_count_only():
    norm = LevelBatchNorm2d(3, LEVELS, NormSpec.from_table5_row(6))
    with pytest.raises(CheckpointError, match="4 channels"):
        copy_norm_state(norm, make("levels_row6"))
    assert set(make_features()) == set(LEVELS)

"""Norms of whole models replaced by pattern: torchvision's detectors, and small models with traps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torchvision.models import detection, resnet18
from torchvision.ops.misc import FrozenBatchNorm2d

from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.forms import find_forms
from bnext.scope import use_domain
from bnext.surgery import convert_norm, convert_norm_state
from tests.cases import LEVELS, make_norm, randomize
from tests.workers import run_workers

DOMAINS = ("day", "night")
SEPARATE = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
DETECTORS = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")


def small():
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)]
    return randomize(nn.Sequential(*layers)).eval()


def list_norms(model, kind=nn.Module):
    return {path: module for path, module, _ in find_forms(model) if isinstance(module, kind)}


@torch.no_grad()
def detect(model, seed=0):
    """Everything that the norms have a part in: features, and the heads' outputs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 3, 64, 64, generator=generator)
    features = model.backbone(images)
    head = model.head if hasattr(model, "head") else model.rpn.head
    outputs = head(list(features.values()))
    outputs = [*outputs.values()] if isinstance(outputs, dict) else [x for part in outputs for x in part]
    if hasattr(model, "roi_heads"):
        rois = torch.rand(3, 256, 7, 7, generator=generator)
        outputs.append(model.roi_heads.box_head(rois))
        outputs.append(model.roi_heads.mask_head(torch.rand(2, 256, 14, 14, generator=generator)))
    return [*features.values(), *outputs]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_of_torchvision_there_and_back(name):
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None).eval()
    before, expected = list_norms(model), detect(model)
    state = copy.deepcopy(model.state_dict())
    report = convert_norm(model, {"backbone": SEPARATE})
    assert report.keeps_outputs
    converted = list_norms(model, BatchNorm2d)
    assert converted.keys() == {path for path in before if path.startswith("backbone.")}
    assert all(norm.path == path and not norm.training for path, norm in converted.items())
    with use_domain("night"):
        torch.testing.assert_close(detect(model), expected, rtol=1e-5, atol=1e-6)
    with use_domain(("day",)):
        torch.testing.assert_close(detect(model), expected, rtol=1e-5, atol=1e-6)
    assert str(report).startswith(f"{len(converted)} norms converted:")
    report = convert_norm(model, {"backbone": nn.BatchNorm2d})
    assert report.keeps_outputs
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {type(norm) for norm in list_norms(model).values()} <= {nn.BatchNorm2d, nn.GroupNorm}


@pytest.mark.parametrize("value", ["BN", "FrozenBN", NormSpec(workers="all"), nn.SyncBatchNorm, nn.BatchNorm2d])
def test_frozen_norms_without_eps_keep_their_outputs(value):
    """pytorch/vision#2599: torchvision's published detectors have eps 0."""
    model = randomize(resnet18(norm_layer=lambda channels: FrozenBatchNorm2d(channels, eps=0.0))).eval().double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    report = convert_norm(model, {"": value})
    assert report.keeps_outputs
    assert "taken over" in str(report)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    assert not list_norms(model, FrozenBatchNorm2d)
    assert ("it was frozen" in str(report)) == (value != "FrozenBN")
    assert any(parameter.requires_grad for norm in list_norms(model).values() for parameter in norm.parameters()) == (
        value != "FrozenBN"
    )


@pytest.mark.parametrize("value", ["GN", "LN", ""])
def test_other_norms_lose_what_they_lose_and_say_so(value):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    randomize(model)
    affine = model[1].weight.clone(), model[1].bias.clone()
    report = convert_norm(model, {"1": value})
    assert not report.keeps_outputs
    if value:
        assert "the population statistics were left out" in str(report)
        assert torch.equal(model[1].weight, affine[0])
        assert torch.equal(model[1].bias, affine[1])
        back = convert_norm(model, {"1": "BN"})
        assert "holds no population statistics" in str(back)
        assert torch.equal(model[1].bias, affine[1])
    else:
        assert isinstance(model[1], nn.Identity)
        assert "the norm was removed" in str(report)
    assert model(torch.rand(1, 3, 4, 4)).shape == (1, 8, 4, 4)


def test_the_last_pattern_holds_and_globs_are_paths_of_norms():
    model = resnet18()
    convert_norm(model, {"": "SyncBN", "layer?.*.bn2": NormSpec(momentum=0.01), "layer4": SEPARATE, "bn1": "FrozenBN"})
    specs = {path: norm.spec for path, norm in list_norms(model, BatchNorm2d).items()}
    assert len(specs) == 20
    assert specs["bn1"].frozen == "both"
    assert specs["layer4.1.bn2"] == SEPARATE
    assert specs["layer3.1.bn2"].momentum == 0.01
    assert specs["layer3.1.bn1"].workers == "all"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("layr1", "near it are layer"), ("layer1.0.bn3", "near it are layer1.0.bn"), ("fc", "matches none of the 20")],
)
def test_a_pattern_without_a_norm_is_refused_and_changes_nothing(pattern, near):
    model = resnet18()
    with pytest.raises(ConfigError, match=rf"got '{pattern}'.*{near}") as caught:
        convert_norm(model, {"": "SyncBN", pattern: NormSpec()})
    assert "Correct the pattern" in str(caught.value)
    assert not list_norms(model, BatchNorm2d)


@pytest.mark.parametrize("training", [True, False])
def test_device_type_mode_and_freezing_are_carried(training):
    model = small().train(training).half()
    model[1].weight.requires_grad_(False)
    convert_norm(model, {"1": SEPARATE})
    norm = model[1]
    assert all(part.training == training for part in norm.modules())
    assert {value.dtype for value in norm.state_dict().values() if value.is_floating_point()} == {torch.float16}
    assert {name for name, value in norm.named_parameters() if value.requires_grad} == {"day.bias", "night.bias"}
    convert_norm(model, {"1": NormSpec(frozen="both")})
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    report = convert_norm(model, {"1": nn.BatchNorm2d})
    assert all(parameter.requires_grad for parameter in model[1].parameters())
    assert "it was frozen" in str(report)


def test_statistics_that_were_held_still_are_held_still():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].track_running_stats = False
    for spec in (NormSpec(), SEPARATE, NormSpec()):
        convert_norm(model, {"": spec})
        with use_domain("day"):
            model(torch.rand(2, 4, 3, 3))
        assert all(int(value) == 0 for key, value in model.state_dict().items() if key.endswith("tracked"))


def test_a_meta_model_is_converted_too():
    with torch.device("meta"):
        model = resnet18(norm_layer=FrozenBatchNorm2d)
    convert_norm(model, {"": NormSpec()})
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


def test_momentum_is_kept_by_names_and_classes_and_said_of_specs():
    for value, kept in (("BN", True), (nn.SyncBatchNorm, True), (NormSpec(), False)):
        for momentum in (0.03, None):
            model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=momentum))
            report = convert_norm(model, {"1": value})
            assert (model[1].momentum == momentum) == kept
            assert (f"momentum was {momentum}, and is 0.1 now" in str(report)) == (not kept)
            if value == "BN":
                assert model[1].spec.average == ("cumulative" if momentum is None else "moving")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.0))
    assert "momentum was 0.0, and is 0.1 now" in str(convert_norm(model, {"1": "BN"}))


def test_answers_that_torch_cannot_hold_are_said():
    model = nn.Sequential(BatchNorm2d(4, NormSpec(normalization_batch_size=2)), BatchNorm2d(4, NormSpec(workers="all")))
    report = convert_norm(model, {"0": nn.BatchNorm2d, "1": nn.SyncBatchNorm})
    assert [change.path for change in report.changes if "were left out" in change.text] == ["0"]
    assert "normalization_batch_size=2" in str(report)


def test_a_norm_at_two_places_stays_one():
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": norm, "b": nn.ModuleDict({"c": norm})})
    report = convert_norm(model, {"": SEPARATE})
    assert model["a"] is model["b"]["c"]
    assert isinstance(model["a"], BatchNorm2d)
    assert {change.path for change in report.changes} == {"a"}
    with pytest.raises(ConfigError, match=r"for a, b\.c"):
        convert_norm(model, {"a": nn.BatchNorm2d})


def test_a_new_domain_starts_from_another_and_plain_norms_are_no_obstacle():
    model = nn.Sequential(BatchNorm2d(4, SEPARATE), nn.BatchNorm2d(4))
    randomize(model)
    state = copy.deepcopy(model[0].state_dict())
    more = SEPARATE.replace(domains=("day", "night", "dusk"))
    assert convert_norm(model, {"": more}, domain_map={"dusk": "night"}).keeps_outputs
    assert torch.equal(model[0].dusk.running_mean, state["night.running_mean"])
    assert torch.equal(model[1].dusk.running_mean, model[1].day.running_mean)
    with pytest.raises(ConfigError, match="'dusk': 'nihgt'"):
        convert_norm(model, {"": more}, domain_map={"dusk": "nihgt"})
    with pytest.raises(ConfigError, match="'dsuk': 'night'"):
        convert_norm_state(model.state_dict(), model, domain_map={"dsuk": "night"})
    convert_norm(model, {"": "BN"}, domain_map={"": "night"})
    assert torch.equal(model[0].running_mean, state["night.running_mean"])


# pytorch/pytorch#187298, huggingface/pytorch-image-models#1254: what a subclass adds was dropped without a word


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class WithModule(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(super().forward(x))


class WithParameter(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gate = nn.Parameter(torch.ones(channels))


class FrozenWithActivation(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OfOurs(BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (WithActivation, "WithActivation: its forward is its own.*treat_as"),
        (FrozenWithActivation, "FrozenWithActivation: its forward is its own.*treat_as"),
        (OfOurs, "OfOurs: its forward is its own.*treat_as"),
        (WithModule, "it holds drop besides"),
        (WithParameter, "it holds gate besides a norm's state"),
    ],
)
def test_norms_that_are_more_than_norms_are_refused(kind, what):
    model = nn.Sequential(nn.BatchNorm2d(4), kind(4))
    nn.init.zeros_(model[1].weight)  # as in many residual blocks: an activation does not show in the outputs
    with pytest.raises(ConfigError, match=rf"{what}.*\(1\)"):
        convert_norm(model, {"": NormSpec()})
    assert type(model[0]) is nn.BatchNorm2d
    convert_norm(model, {"0": NormSpec()})
    assert type(model[1]) is kind


def test_a_class_that_the_caller_vouches_for_is_converted():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), WithActivation(4))
    report = convert_norm(model, {"": NormSpec()}, treat_as={WithActivation: nn.BatchNorm2d})
    assert type(model[1]) is BatchNorm2d
    assert "training other than torch's (WithActivation)" in str(report)


def test_a_parametrized_norm_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    with pytest.raises(ConfigError, match="parametrizations"):
        convert_norm(model, {"": NormSpec()})


def test_hooks_attributes_and_process_groups_are_said():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4, process_group=object()))
    model[0].register_forward_hook(lambda *_: None)
    model[0].budget = 3
    text = str(convert_norm(model, {"": NormSpec()}))
    assert "left out: its budget, hooks" in text
    assert "left out: its process_group" in text


# Levels


def test_level_norms_by_pattern():
    model = nn.ModuleDict({"tower": LevelBatchNorm2d(4, ("p3", "p4")), "stem": nn.BatchNorm2d(4)})
    randomize(model)
    report = convert_norm(model, {"tower": NormSpec.from_table5_row(6)})
    assert model["tower"].spec.table5_row == 6
    assert model["tower"].levels == ("p3", "p4")
    assert report.keeps_outputs
    convert_norm(model, {"tower": "SyncBN"})
    assert model["tower"].spec.workers == "all"
    with pytest.raises(ConfigError, match=r"'GN' \(tower\)"):
        convert_norm(model, {"tower": "GN"})
    with pytest.raises(ConfigError, match=r"per_level.*\(stem\)"):
        convert_norm(model, {"": NormSpec.from_table5_row(6)})


def test_patterns_and_fields_together_are_refused():
    for specs in ({"": NormSpec()}, {}):
        with pytest.raises(ConfigError, match="frozen"):
            convert_norm(small(), specs, frozen="both")


def test_what_makes_no_norm_is_refused():
    with pytest.raises(ConfigError, match="Identity"):
        convert_norm(small(), {"1": nn.Identity})
    with pytest.raises(ConfigError, match="'BatchNorm'"):
        convert_norm(small(), {"1": "BatchNorm"})


def test_a_bare_norm_is_refused():
    with pytest.raises(ConfigError, match="BatchNorm2d"):
        convert_norm(nn.BatchNorm2d(4), {"": NormSpec()})


def test_layer_norms_of_the_last_dimension_are_none_of_these():
    model = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(4))
    convert_norm(model, {"": NormSpec()})
    assert type(model[0]) is nn.LayerNorm


def test_the_report_counts():
    assert str(convert_norm(small(), {"1": NormSpec()})) == "1 norms converted: nothing was lost."
    text = str(convert_norm(small(), {"": NormSpec(eps=1e-3)}, adopt_eps=False))
    assert text.startswith("2 norms converted:")
    assert "eps is 0.001, but was 1e-05; outputs change" in text


# ---- levels, by fields of their spec


def make_tower(row):
    return nn.ModuleDict({"conv": nn.Conv2d(2, 4, 1).double(), "norm": make_norm(NormSpec.from_table5_row(row)).eval()})


@pytest.mark.parametrize(("start", "to"), [(3, 4), (3, 6), (1, 2), (5, 6), (4, 6)])
def test_there_and_back_keeps_the_state(start, to):
    model = make_tower(start)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for spec in (NormSpec.from_table5_row(to), NormSpec.from_table5_row(start)):
        convert_norm(model, statistics=spec.statistics, population=spec.population, affine=spec.affine)
        assert model["norm"].spec == spec
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=1e-14, atol=1e-14)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("training", [True, False])
def test_level_norms_keep_mode_type_path_and_freezing(training):
    model = make_tower(3).train(training)
    model["norm"].path = "norm"
    model["norm"].requires_grad_(False)
    convert_norm(model, population="per_level", workers="all")
    norm = model["norm"]
    assert norm.levels == LEVELS
    assert all(module.training == training for module in norm.modules())
    assert norm.path == "norm"
    assert norm.spec == NormSpec.from_table5_row(4, workers="all")
    assert {value.dtype for value in norm.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_a_model_without_level_norms_has_nothing_to_convert():
    with pytest.raises(ConfigError, match="level norm.*Sequential"):
        convert_norm(small(), population="per_level")


# ---- arguments


@pytest.mark.parametrize("specs", ["SyncBN", NormSpec(), [NormSpec()], {1: NormSpec()}, {"1": None}, {"1": 3}])
def test_patterns_map_names_to_norms(specs):
    model = small()
    with pytest.raises(ConfigError, match="specs"):
        convert_norm(model, specs)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_field_that_a_spec_has_not_is_named():
    with pytest.raises(ConfigError, match="poplation"):
        convert_norm(nn.Sequential(LevelBatchNorm2d(4, ["p3"])), poplation="shared")


def convert_wrapped(rank):
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        convert_norm(DistributedDataParallel(small()), {"": NormSpec()})


def test_a_wrapped_model_is_refused():
    run_workers(convert_wrapped, 2)


def test_parameters_that_come_apart_are_reported():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    report = convert_norm(model, {"": NormSpec()})
    told = {(change.path, change.text) for change in report.changes}
    assert told == {(path, "its weight was shared with another module, and is its own now") for path in ("0", "1")}


class MaskrcnnBenchmarkFrozenBatchNorm(nn.Module):
    """As the class of that name: four buffers, no eps, a forward of its own."""

    def __init__(self, num_features):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def test_a_frozen_norm_stays_one_whatever_it_is_treated_as():
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), MaskrcnnBenchmarkFrozenBatchNorm(3)).eval()
    expected = model(x)
    with pytest.raises(ConfigError, match="treat_as"):
        convert_norm(model, {"": NormSpec()})
    report = convert_norm(model, {"": NormSpec()}, treat_as={MaskrcnnBenchmarkFrozenBatchNorm: nn.BatchNorm2d})
    assert "it was frozen" in str(report)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_is_removed_whatever_it_computes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), MaskrcnnBenchmarkFrozenBatchNorm(3))
    convert_norm(model, {"1": ""})
    assert "0.weight" in model.state_dict()
    assert len(model.state_dict()) == 2


@pytest.mark.parametrize("treat_as", [[nn.BatchNorm2d], {nn.BatchNorm2d: nn.Conv2d}])
def test_what_treat_as_must_be(treat_as):
    with pytest.raises(ConfigError, match="treat_as must"):
        convert_norm(small(), {"": NormSpec()}, treat_as=treat_as)


def test_treat_as_is_for_the_class_that_it_names():
    class Plain(nn.BatchNorm2d):
        pass

    model, expected = small(), small()
    report = convert_norm(model, {"": NormSpec()}, treat_as={Plain: nn.GroupNorm})
    assert str(report) == str(convert_norm(expected, {"": NormSpec()}))


def test_a_misspelt_pattern_gets_the_module_that_is_near():
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(ConfigError, match="near it are layer1"):
        convert_norm(model, {"layr1": "BN"})
    with pytest.raises(ConfigError, match="no norm at all"):
        convert_norm(nn.Sequential(nn.ReLU()), {"layr1": "BN"})


@pytest.mark.parametrize("num_groups", [1, 2, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_a_group_norm_takes_the_population_in(num_groups, affine):
    """An image whose groups have the population's statistics gets the outputs that it had; others are near them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-3, affine=affine)).double().eval()
    image = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        features = model[0](image)
        model[1].running_mean.copy_(features.mean((0, 2, 3)))
        model[1].running_var.copy_(features.var((0, 2, 3), correction=0))
        for parameter in model[1].parameters():
            parameter.normal_()

    expected = model(image)
    report = convert_norm(model, {"1": lambda channels: nn.GroupNorm(num_groups, channels)})
    torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)
    assert not report.keeps_outputs
    assert "the population statistics were left out" in str(report)
    assert "how an image differs from them is lost" in str(report)

"""Folded models compute what they did, or are refused; what is not folded is said."""

import copy
import re

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d as WrappedConv2d
from detectron2.layers import CycleBatchNormList, DeformConv, NaiveSyncBatchNorm
from detectron2.layers import FrozenBatchNorm2d as DetectronFrozen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozen

from bnext import use_domain
from bnext.errors import ConfigError, DomainError, StatisticsError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.folded_norm import FoldedNorm
from bnext.surgery.fold import fold_norms
from tests.heads.detectors import make_detector

LEVELS = ("p3", "p4")
DOMAINS = ("day", "night")
PER_DOMAIN = NormSpec(population="per_domain", affine="per_domain", statistics="per_domain", domains=DOMAINS)


def randomize(model, seed=0):
    """Statistics and affines that no default could stand in for; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        owner = model.get_submodule(name.rpartition(".")[0])
        is_of_norm = name.endswith(("weight", "bias", "running_mean", "running_var"))
        if isinstance(owner, nn.modules.conv._ConvNd | nn.Linear) or not is_of_norm:
            continue
        random = torch.rand(value.shape, generator=generator)
        value.data.copy_(random + 0.5 if name.endswith(("weight", "running_var")) else 0.2 * (random - 0.5))
    return model.eval()


def assert_unchanged(run, model, tolerance, **arguments):
    """Fold, and compare what `run` gives; the report."""
    with torch.no_grad():
        expected = run(model)
        report = fold_norms(model, **arguments)
        outputs = run(model)
    for output, before in zip(outputs, expected, strict=True):
        assert (output - before).abs().max() <= tolerance * before.abs().max()
    return report


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [*map(id, model.modules())]


def assert_untouched(model, before):
    assert before[1] == [*map(id, model.modules())]
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[0][name], rtol=0, atol=0, equal_nan=True)


def make_tower(norm, channels=4, bias=False):
    torch.manual_seed(0)
    return randomize(nn.Sequential(nn.Conv2d(3, channels, 3, bias=bias), norm, nn.ReLU()))


# ---- models of the field


@pytest.mark.parametrize(
    ("norm", "dtype", "tolerance"), [("FrozenBN", torch.float32, 1e-5), ("BN", torch.float64, 1e-12)]
)
def test_detectron2_resnet50_fpn(norm, dtype, tolerance):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_retinanet_resnet_fpn_backbone", 0
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS = 8, 32, 32
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = norm
    torch.manual_seed(0)
    model = randomize(build_backbone(cfg)).to(dtype)
    images = torch.randn(1, 3, 96, 64, dtype=dtype)
    report = assert_unchanged(lambda model: model(images).values(), model, tolerance)
    assert len(report.folded) == 53 + 6
    assert not report.left
    assert report.folded["bottom_up.stem.conv1.norm"] == "bottom_up.stem.conv1"
    assert not any("running_mean" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize(
    ("make", "num_norms"), [(torchvision.models.resnet18, 20), (torchvision.models.mobilenet_v3_small, 34)]
)
def test_torchvisions_classifiers_fold_whole(make, num_norms):
    torch.manual_seed(0)
    model = randomize(make()).double()
    images = torch.randn(2, 3, 64, 64).double()
    report = assert_unchanged(lambda model: model(images), model, 1e-12)
    assert (len(report.folded), report.left) == (num_norms, {})


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("retinanet_resnet50_fpn", "backbone.body.layer4.2.bn3"),
        ("maskrcnn_resnet50_fpn_v2", "roi_heads.mask_head.3.1"),
    ],
)
def test_torchvisions_detectors_fold_whole(name, last):
    torch.manual_seed(0)
    model = randomize(getattr(detection, name)(weights=None, weights_backbone=None)).double()
    images, rois = torch.randn(1, 3, 64, 64).double(), torch.randn(2, 256, 7, 7).double()

    def run(model):
        features = list(model.backbone(images).values())
        if hasattr(model, "head"):
            return [*features, *model.head(features).values()]
        return [*features, model.roi_heads.box_head(rois), model.roi_heads.mask_head(rois)]

    report = assert_unchanged(run, model, 1e-12)
    assert not report.left
    assert last in report.folded


def test_a_whole_detector_predicts_the_same():
    detector = randomize(make_detector(row=1))
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255

    def run(model):
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        logits, deltas = model.head([features[level] for level in model.head_in_features])
        return *logits, *deltas

    report = assert_unchanged(run, detector, 1e-5)
    assert not report.left
    assert {"head.cls_subnet.1", "head.bbox_subnet.4"} <= report.folded.keys()
    assert "instances" in detector([{"image": image}])[0]


def test_densenet_reports_norms_before_convolutions():
    model = randomize(torchvision.models.densenet121()).double()
    images = torch.randn(1, 3, 32, 32).double()
    report = assert_unchanged(lambda model: model(images), model, 1e-12)
    assert len(report.folded) + len(report.left) == 121
    assert report.left["features.transition1.norm"] == "no convolution feeds it directly"
    assert "no convolution feeds it directly" in str(report)


# ---- every kind of norm and of convolution


@pytest.mark.parametrize(
    "make",
    [
        nn.BatchNorm2d,
        lambda channels: nn.BatchNorm2d(channels, eps=0.3, affine=False),
        nn.SyncBatchNorm,
        NaiveSyncBatchNorm,
        DetectronFrozen,
        lambda channels: TorchvisionFrozen(channels, eps=0.3),
        BatchNorm2d,
        lambda channels: BatchNorm2d(channels, NormSpec(affine="none", frozen="statistics", eps=0.3)),
        lambda channels: BatchNorm2d(channels, NormSpec(workers="all", frozen="both")),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("owned", [False, True])
def test_every_norm(make, bias, owned):
    model = make_tower(make(4), bias=bias).double()
    if owned:
        conv = WrappedConv2d(3, 4, 3, bias=bias, norm=model[1], activation=nn.PReLU())
        model = nn.Sequential(conv).double().eval()
    x = torch.randn(2, 3, 5, 6).double()
    report = assert_unchanged(lambda model: model(x), model, 1e-12)
    assert report.folded == ({"0.norm": "0"} if owned else {"1": "0"})
    assert any(isinstance(part, FoldedNorm) for part in model.modules())


@given(
    axes=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    dilation=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
)
@settings(max_examples=30, deadline=None)
def test_every_convolution(axes, transposed, groups, mode, dilation, stride):
    kind = f"Conv{'Transpose' if transposed else ''}{axes}d"
    extra = {} if transposed else {"padding_mode": mode}
    conv = getattr(nn, kind)(4, 6, 3, stride, 2, dilation=dilation, groups=groups, **extra)
    model = randomize(nn.Sequential(conv, getattr(nn, f"BatchNorm{axes}d")(6))).double()
    x = torch.randn(2, 4, *[6] * axes).double()
    assert assert_unchanged(lambda model: model(x), model, 1e-12).folded == {"1": "0"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_types_memory_format_and_gradients_are_kept(dtype, tolerance):
    model = make_tower(nn.BatchNorm2d(4))
    model[0].to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(2, 3, 5, 6, dtype=dtype)
    assert_unchanged(lambda model: model(x).float(), model, tolerance)
    conv = model[0]
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad


def test_a_weight_that_leaves_the_range_of_its_type_is_refused():
    model = make_tower(nn.BatchNorm2d(4)).half()
    model[1].float().running_var.fill_(1e-12)
    model[1].weight.data.fill_(1e4)
    before = snapshot(model)
    with pytest.raises(StatisticsError, match=r"torch\.float16.*\(0 with 1\)"):
        fold_norms(model)
    assert_untouched(model, before)


# ---- levels and domains


@pytest.mark.parametrize("row", [1, 3])
def test_shared_level_norms_fold_for_all_levels(row):
    model = make_tower(LevelBatchNorm2d(4, LEVELS, NormSpec.from_table5_row(row))).double()
    features = {level: torch.randn(2, 3, 5, 5).double() for level in LEVELS}

    def run(model):
        return model[1]({level: model[0](feature) for level, feature in features.items()}).values()

    assert assert_unchanged(run, model, 1e-12).folded == {"1": "0"}
    with pytest.raises(StatisticsError, match=r"'p9' \(1\)"):
        model[1]({"p9": features["p3"]})


@pytest.mark.parametrize("row", [2, 4, 5, 6])
def test_level_norms_fold_for_one_level_and_refuse_the_others(row):
    model = make_tower(LevelBatchNorm2d(4, LEVELS, NormSpec.from_table5_row(row))).double()
    x = torch.randn(2, 3, 5, 5).double()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"domain must .*None \(1\)"):
        fold_norms(model)
    with pytest.raises(ConfigError, match=r"domain must .*'p5'"):
        fold_norms(model, "p5")
    assert_untouched(model, before)
    for level in LEVELS:
        one = copy.deepcopy(model)
        with torch.no_grad():
            expected = model[1]({level: model[0](x)})[level].relu()
        assert fold_norms(one, level).domain == level
        assert torch.allclose(one(x), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(one[1]({level: x})[level], x)
        other = next(name for name in LEVELS if name != level)
        with pytest.raises(StatisticsError, match=f"got '{other}'"):
            one[1]({level: x, other: x})


def test_domain_norms_fold_for_one_domain_and_refuse_the_others():
    model = make_tower(BatchNorm2d(4, PER_DOMAIN.replace(fallback_domain="night"))).double()
    x = torch.randn(2, 3, 5, 5).double()
    with use_domain("night"), torch.no_grad():
        expected = model(x)
    with pytest.raises(ConfigError, match="domain"):
        fold_norms(model)
    fold_norms(model, "night")
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    for name in ("night", "fog", ["night", "fog"]):  # the second is taken for the fallback, as the norm did
        with use_domain(name):
            assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    for name in ("day", ["night", "day"]):
        with pytest.raises(DomainError, match=r"'day' \(1\)"), use_domain(name):
            model(x)


@pytest.mark.parametrize(
    ("population", "affine", "name"),
    [
        ("per_domain", "shared", "night"),
        ("per_level", "none", "p3"),
        ("per_level", "per_domain", "night_p3"),
        ("per_level_and_domain", "per_domain", "night_p3"),
    ],
)
def test_norms_of_levels_and_domains_fold_for_what_has_one_state(population, affine, name):
    spec = NormSpec(statistics="per_domain", population=population, affine=affine, domains=DOMAINS)
    model = make_tower(LevelBatchNorm2d(4, LEVELS, spec)).double()
    x = torch.randn(2, 3, 5, 5).double()
    served = {level: domain for domain in DOMAINS for level in LEVELS if name in (domain, level, f"{domain}_{level}")}
    for wrong in (None, {"p3": "night", "night": "p3", "night_p3": "night"}[name]):
        with pytest.raises(ConfigError, match=f"domain must be one of .*'{name}'"):
            fold_norms(model, wrong)

    expected = {}
    for level, domain in served.items():
        with use_domain(domain), torch.no_grad():
            expected[level] = model[1]({level: model[0](x)})[level].relu()
    fold_norms(model, name)
    for level, domain in served.items():
        with use_domain(domain):
            assert torch.allclose(model[1]({level: model[0](x)})[level].relu(), expected[level], rtol=1e-12, atol=1e-12)
    if len(served) == 1:
        with use_domain("night"), pytest.raises(StatisticsError, match="'p4'"):
            model[1]({"p4": x})
    if "night" in name:
        with use_domain("day"), pytest.raises(DomainError, match="'day'"):
            model[1]({"p3": x})


def test_a_domain_of_a_model_without_domains_is_refused():
    with pytest.raises(ConfigError, match="domain"):
        fold_norms(make_tower(nn.BatchNorm2d(4)), "night")


def test_a_single_level_needs_no_choice():
    model = make_tower(LevelBatchNorm2d(4, ["p3"], NormSpec.from_table5_row(6)))
    assert fold_norms(model).folded == {"1": "0"}


# ---- refused: nothing is changed


def spoil(norm, name, value):
    getattr(norm, name)[2] = value
    return norm


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (lambda: spoil(nn.BatchNorm2d(4), "running_var", -1e-3), r"-0\.001.* channel 2 \(2\.1\)"),
        (lambda: spoil(nn.BatchNorm2d(4), "running_mean", float("nan")), r"mean nan .* in channel 2 \(2\.1\)"),
        (lambda: spoil(DetectronFrozen(4), "running_var", float("inf")), r"variance inf in channel 2 \(2\.1\)"),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), r"none \(2\.1\)"),
        (
            lambda: BatchNorm2d(4, NormSpec(population="none", inference="mini_batch")),
            r"inference.*\(2\.1\)",
        ),
        (lambda: BatchNorm2d(4, NormSpec(inference="mini_batch")), r"inference.*\(2\.1\)"),
        (lambda: nn.BatchNorm2d(4).train(), r"training mode \(2\.1\)"),
    ],
)
def test_what_cannot_be_folded_is_refused_before_the_first_change(norm, message):
    norm = norm()
    mode = norm.training
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 1), norm)).eval()
    norm.train(mode and "training" in message)
    before = snapshot(model)
    with pytest.raises((StatisticsError, ConfigError), match=message):
        fold_norms(model)
    assert_untouched(model, before)


# ---- structure


class Shared(nn.Module):
    """One convolution, a norm per level: the towers of EfficientDet."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, a, b):
        return self.norms[0](self.conv(a)), self.norms[1](self.conv(b))


class OneNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.a(x)), self.norm(self.b(x))


class Leaks(nn.Module):
    """The output of the convolution, or its weight, has another use."""

    def __init__(self, weight):
        super().__init__()
        self.conv, self.norm, self.of_weight = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), weight

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), self.conv.weight.sum() if self.of_weight else y


def share_norm(*classes):
    """One norm in several convolutions that own theirs."""
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(*(make(3, 3, 1, norm=norm) for make in classes))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.bn1(self.conv1(x)) if len(x) else x


class ConvThenActivation(nn.Conv2d):
    """Its norm comes last, as that of no convolution of detectron2."""

    def __init__(self, *arguments, norm):
        super().__init__(*arguments)
        self.norm = norm

    def forward(self, x):
        return self.norm(super().forward(x).relu())


class PreActivation(ConvThenActivation):
    """Norm, activation, convolution: a block of an identity mapping, or of DenseNet."""

    def forward(self, x):
        return super(ConvThenActivation, self).forward(self.norm(x).relu())


class StandardizedConv(nn.Conv2d):
    """Weight standardization."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class PaddedConv(nn.Conv2d):
    """TensorFlow's padding: something else before the convolution, and nothing after it."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class PreActivationBlock(nn.Module):
    """bn1 follows conv1 in the order and the names of the modules, and comes before it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv1(self.bn1(x).relu())


def alias():
    """The convolution of a Sequential also lies on its owner, whose forward cannot be read."""
    model = Untraceable()
    model.body = nn.Sequential(model.conv1, nn.BatchNorm2d(4))
    return model


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (Shared, {"norms.0": "used elsewhere", "norms.1": "used elsewhere"}),
        (OneNorm, {"norm": "used after different modules"}),
        (lambda: Leaks(False), {"norm": "used elsewhere"}),
        (lambda: Leaks(True), {"norm": "used elsewhere"}),
        (Untraceable, {"bn1": r"the forward of Untraceable cannot be traced: .*name the pair"}),
        (alias, {"bn1": "cannot be traced", "body.1": "the forward of Untraceable cannot be traced"}),
        (lambda: nn.Sequential(nn.BatchNorm2d(3)), {"0": "no convolution feeds it directly"}),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), {"1": "feeds it directly, but a Linear"}),
        (lambda: nn.ModuleDict({"norm": nn.BatchNorm2d(3)}), {"norm": "cannot be traced|does not call it"}),
        (lambda: make_convolution_with_activation(), {"1": "does more before the norm than to convolve"}),
        (PreActivationBlock, {"bn1": "no convolution feeds it directly"}),
        (lambda: nn.Sequential(PreActivation(3, 3, 1, norm=nn.BatchNorm2d(3))), {"0.norm": "no convolution feeds it"}),
        (lambda: nn.Sequential(ConvThenActivation(3, 3, 1, norm=nn.BatchNorm2d(3))), {"0.norm": "no convolution"}),
        (lambda: nn.Sequential(StandardizedConv(3, 4, 1), nn.BatchNorm2d(4)), {"1": "does more before the norm"}),
        (lambda: share_norm(WrappedConv2d, WrappedConv2d), {"0.norm": "several modules use it"}),
        (lambda: share_norm(WrappedConv2d, DeformConv), {"0.norm": "several modules use it"}),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
            {"1": "computed from other parameters"},
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Doubling(4)), {"1": "its own: it may do more, or other"}),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), CycleBatchNormList(2, num_features=4)),
            {"1.0": "no convolution feeds it directly", "1.1": "does not call it"},
        ),
    ],
)
def test_what_is_not_folded_is_reported_and_untouched(make, left):
    model = make().eval()
    before = snapshot(model)
    attributes = dict(vars(model))
    report = fold_norms(model)
    assert not report.folded
    assert report.left.keys() == left.keys()
    for path, reason in left.items():
        assert re.search(reason, report.left[path]), report.left[path]
    assert_untouched(model, before)
    assert vars(model) == attributes


def make_convolution_with_activation():
    conv = WrappedConv2d(3, 4, 1, activation=torch.relu)
    return randomize(nn.Sequential(conv, nn.BatchNorm2d(4)))


class Doubling(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_convolution_of_another_class_that_only_convolves_is_folded():
    model = randomize(nn.Sequential(PaddedConv(3, 4, 3), nn.BatchNorm2d(4))).double()
    x = torch.randn(2, 3, 5, 6).double()
    assert assert_unchanged(lambda model: model(x), model, 1e-12).folded == {"1": "0"}


def test_a_named_pair_does_not_override_what_its_convolution_does():
    model = make_convolution_with_activation()
    assert "more before the norm" in fold_norms(model, pairs=[("0", "1")]).left["1"]


def test_hooks_between_the_two_are_respected():
    model = make_tower(nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert "hooks" in fold_norms(model).left["1"]


def test_the_same_pair_at_two_places_is_folded_once():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    model = randomize(nn.Sequential(conv, norm, nn.ReLU(), conv, norm)).double()
    x = torch.randn(2, 3, 4, 4).double()
    assert_unchanged(lambda model: model(x), model, 1e-12)
    assert model[1] is model[4]
    tower = randomize(nn.Sequential(conv, nn.BatchNorm2d(3)))
    twice = nn.ModuleDict({"a": tower, "b": tower, "c": nn.Sequential(tower, nn.ReLU())})
    assert fold_norms(twice).folded == {"a.1": "a.0"}
    assert isinstance(twice["c"][0][1], FoldedNorm)


def test_an_alias_that_is_not_called_is_no_obstacle():
    model = torchvision.models.resnet18()
    model.stem = nn.ModuleDict({"conv": model.conv1})
    model.first = model.conv1
    assert fold_norms(model.eval()).folded["layer1.0.bn1"]


def test_tied_weights_stay_what_they_were_elsewhere():
    model = make_tower(nn.BatchNorm2d(4))
    other = nn.Conv2d(3, 4, 3)
    other.weight = model[0].weight
    before = other.weight.clone()
    fold_norms(model)
    assert torch.equal(other.weight, before)


def test_named_pairs():
    model = randomize(Untraceable()).double()
    x = torch.randn(2, 3, 4, 4).double()
    report = assert_unchanged(lambda model: model(x), model, 1e-12, pairs=[("conv1", "bn1")])
    assert (report.folded, report.left) == ({"bn1": "conv1"}, {})


@pytest.mark.parametrize(
    "pairs",
    [
        [("conv", "bn1")],
        [("bn1", "conv1")],
        [("conv1", "bn1"), ("conv1", "bn1")],
        [("conv1", "bn1", "relu")],
        ["ab"],
    ],
)
def test_wrong_named_pairs_are_refused(pairs):
    with pytest.raises(ConfigError, match="pairs"):
        fold_norms(Untraceable().eval(), pairs=pairs)


def test_named_pairs_do_not_override_other_uses():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    report = fold_norms(model, pairs=[("0", "3")])
    assert not report.folded
    assert report.left["1"] == report.left["3"] == "its convolution (0) has other norms, too"


def test_named_pairs_must_agree_in_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(1)).eval()
    assert fold_norms(model, pairs=[("0", "1")]).left == {"1": "it has 1 channels, its convolution 4"}


# ---- a folded model


def test_a_folded_model_is_not_trained_but_on_demand():
    x = torch.randn(2, 3, 5, 5)
    model = make_tower(nn.BatchNorm2d(4))
    fold_norms(model)
    with pytest.raises(StatisticsError, match=r"training mode \(1\)"):
        model.train()(x)
    assert model.eval()(x).shape == (2, 4, 3, 3)
    model = make_tower(nn.BatchNorm2d(4))
    fold_norms(model, allow_training=True)
    model.train()(x).sum().backward()
    assert model[0].bias.grad is not None


def test_folding_twice_changes_nothing():
    model = make_tower(nn.BatchNorm2d(4))
    fold_norms(model)
    before = snapshot(model)
    report = fold_norms(model)
    assert (report.folded, report.left) == ({}, {})
    assert_untouched(model, before)


def fold(norm, domain=None):
    model = make_tower(norm)
    fold_norms(model, domain)
    return model


@pytest.mark.parametrize("make", [nn.BatchNorm2d, DetectronFrozen, BatchNorm2d])
def test_folded_and_unfolded_checkpoints_are_told_apart_by_their_keys(make):
    plain, folded = make_tower(make(4), bias=True), fold(make(4))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.running_var"):
        folded.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*1\."):
        plain.load_state_dict(folded.state_dict())


def test_report_reads_well():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert str(fold_norms(model)) == (
        "1 norms were folded into their convolutions, 1 were left.\n  0: no convolution feeds it directly"
    )


def test_folded_models_compile():
    model = fold(nn.BatchNorm2d(4))
    x = torch.randn(1, 3, 5, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x))


class SameConv(nn.Conv2d):
    """Pads as its input needs, which no trace can follow."""

    def forward(self, input):
        if input.shape[-1] % 2:
            input = nn.functional.pad(input, (1, 0, 1, 0))
        return super().forward(input)


def test_a_convolution_that_cannot_be_traced_is_folded_where_the_caller_vouches():
    model, x = randomize(nn.Sequential(SameConv(3, 4, 3), nn.BatchNorm2d(4)).double()), torch.randn(2, 3, 7, 7).double()
    expected = model(x)
    assert "cannot be traced" in fold_norms(model).left["1"]
    assert not fold_norms(model, pairs=[("0", "1")]).left
    torch.testing.assert_close(model(x), expected)

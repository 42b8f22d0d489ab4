"""`BatchNorm2d`: names, what may be changed at run time, what it refuses and says."""

import logging

import pytest
import torch
from torch import nn

from bnext.errors import ConfigError, StatisticsError
from bnext.layers import BatchNorm2d, NormSpec, name_norms
from bnext.scope import use_domain
from tests.cases import DOMAINS, NUM_CHANNELS, Case, pick_cases, randomize

OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
EVERY_KIND = pick_cases(
    "plain",
    "ghost2",
    "renorm",
    "train_by_population",
    "frozen_statistics",
    "no_affine",
    "domains-one",
    "domains-mixed",
)


def draw(n=5, h=4, w=3, seed=0):
    return torch.randn(n, NUM_CHANNELS, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(spec, path="backbone.stem.norm"):
    norm = randomize(BatchNorm2d(NUM_CHANNELS, spec).double())
    norm.path = path
    return norm.train()


# ---- what it is


def test_initial_state_is_torchs():
    fresh = nn.BatchNorm2d(NUM_CHANNELS).state_dict()
    for spec in (NormSpec(), OWN):
        state = BatchNorm2d(NUM_CHANNELS, spec).state_dict()
        assert all(torch.equal(value, fresh[key.rpartition(".")[2]]) for key, value in state.items())


def test_it_is_a_batch_norm_by_type_and_its_domains_own_state_is_too():
    norm = BatchNorm2d(NUM_CHANNELS, OWN)
    assert all(isinstance(module, nn.BatchNorm2d) for module in norm.modules())
    with pytest.raises(RuntimeError, match="must not be called"):
        norm.day(draw())


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (NormSpec(), "BatchNorm2d(4)"),
        (NormSpec(workers="all", normalization_batch_size=None), "BatchNorm2d(4, workers='all')"),
        (NormSpec(normalization_batch_size=2, training="renorm"), "normalization_batch_size=2, training='renorm'"),
        (OWN, "domains=('day', 'night', 'fog')"),
    ],
)
def test_repr_tells_what_differs_from_torchs(spec, text):
    assert text in repr(BatchNorm2d(NUM_CHANNELS, spec))


def test_who_owns_what():
    norm = BatchNorm2d(NUM_CHANNELS, OWN.replace(affine="shared"))
    assert norm.affine_state("night") is norm
    assert norm.population_state("night") is norm.night
    assert list(norm.populations()) == [((name,), norm.get_submodule(name)) for name in DOMAINS]
    shared = BatchNorm2d(NUM_CHANNELS, OWN.replace(population="shared"))
    assert list(shared.populations()) == [(DOMAINS, shared)]
    ((names, owner),) = (plain := BatchNorm2d(NUM_CHANNELS)).populations()
    assert (names, owner) == ((), plain)
    without = NormSpec(population="none", inference="mini_batch")
    assert not list(BatchNorm2d(NUM_CHANNELS, without).populations())


# ---- what may be changed while it trains


def test_the_momentum_in_force_is_the_attribute():
    for spec in (NormSpec(momentum=0.3), NormSpec(momentum=0.3, normalization_batch_size=2)):
        norm = build(spec)
        norm.momentum = 1.0
        norm(draw())
        torch.testing.assert_close(norm.running_mean, draw().mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, draw().var((0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_renorms_limits_in_force_are_attributes():
    norm, plain = build(NormSpec(training="renorm")), build(NormSpec())
    norm.r_max, norm.d_max = 1.0, 0.0
    torch.testing.assert_close(norm(draw()), plain(draw()), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(build(NormSpec(training="renorm"))(draw()), plain(draw()))


def test_renorm_without_limits_is_normalized_by_the_population():
    norm, frozen = build(NormSpec(training="renorm", r_max=1e9, d_max=1e9)), build(NormSpec(frozen="statistics"))
    torch.testing.assert_close(norm(draw()), frozen(draw()), rtol=1e-11, atol=1e-11)


def test_a_spec_may_be_replaced_to_freeze_and_unfreeze():
    norm, plain = build(NormSpec()), build(NormSpec())
    before = norm.running_mean.clone()
    norm.spec = norm.spec.replace(frozen="statistics")
    output = norm(draw())
    assert torch.equal(norm.running_mean, before)
    torch.testing.assert_close(output, plain.eval()(draw()), rtol=0, atol=0)
    norm.spec = norm.spec.replace(frozen="none")
    norm(draw())
    assert not torch.equal(norm.running_mean, before)


def test_groups_take_one_update_and_are_normalized_apart():
    norm, plain = build(NormSpec(normalization_batch_size=2)), build(NormSpec())
    whole = draw()
    output = norm(whole)
    plain(whole)
    torch.testing.assert_close(dict(norm.state_dict()), dict(plain.state_dict()), rtol=1e-12, atol=1e-12)
    for start, end in ((0, 2), (2, 4), (4, 5)):
        torch.testing.assert_close(output[start:end], build(NormSpec())(whole[start:end]), rtol=1e-12, atol=1e-12)


# ---- what it refuses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, NUM_CHANNELS + 1, 3, 3), r"features must be \[N, 4, H, W\]; got \[2, 5, 3, 3\] \(0.stem"),
        ((NUM_CHANNELS, 3, 3), r"got \[4, 3, 3\] \(0.stem"),
        ((2, NUM_CHANNELS), r"got \[2, 4\] \(0.stem"),
        ((2, NUM_CHANNELS, 3, 3, 3), r"got \[2, 4, 3, 3, 3\] \(0.stem"),
    ],
)
@pytest.mark.parametrize("case", EVERY_KIND)
def test_wrong_shapes_are_refused_with_the_layers_path(case, shape, text, training):
    model = nn.Sequential(nn.ModuleDict({"stem": case.build()})).train(training)
    name_norms(model)
    with pytest.raises(StatisticsError, match=text):
        case.call(model[0]["stem"], {"x": torch.zeros(shape, dtype=torch.float64)})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY_KIND)
def test_another_device_is_refused_with_the_layers_path(case, training):
    norm = case.build().train(training)
    norm.path = "backbone.stem.norm"
    with pytest.raises(StatisticsError, match=r"device of the norm, cpu; got meta \(backbone.stem.norm\)"):
        case.call(norm, {"x": draw().to("meta")})


@pytest.mark.parametrize("case", [*EVERY_KIND, *pick_cases("levels-row1", "levels-row6")])
@pytest.mark.parametrize(
    ("buffer", "value"), [("running_mean", "nan"), ("running_var", "inf"), ("running_var", "-0.5")]
)
def test_broken_running_statistics_are_refused_with_the_layers_path(case, buffer, value):
    """detectron2#2413: a negative variance in a checkpoint became NaN in the loss."""
    norm = case.build().eval()
    norm.path = "backbone.stem.norm"
    case.call(norm, case.inputs())
    state = norm.state_dict()
    key = next(key for key in state if key.endswith(buffer) and not key.startswith(("day", "fog")))
    state[key][2] = float(value)
    norm.load_state_dict(state)  # who loads is checked again
    with pytest.raises(StatisticsError, match=rf"got mean .*{value}.* channel 2 \(backbone.stem.norm") as error:
        case.call(norm, case.inputs())
    assert "recompute_population_statistics" in str(error.value)
    if "." in key:
        assert f"(backbone.stem.norm, {key.partition('.')[0]})" in str(error.value)
    if case.active:
        assert ("stem.norm, night)" in str(error.value)) == key.startswith("night")


@pytest.mark.parametrize("name", ["weight", "forward", "spec", "training", "a.b", "_checked", "domains"])
def test_a_domain_that_cannot_be_a_module_is_refused(name):
    with pytest.raises(ConfigError, match=r"domains must be .* no attribute of the layer; got .* Choose another name"):
        BatchNorm2d(NUM_CHANNELS, OWN.replace(domains=("day", name)))


def test_no_attribute_of_a_norm_can_be_a_domain():
    norm = BatchNorm2d(NUM_CHANNELS, OWN)
    for name in {*vars(norm), *dir(norm)} - {*OWN.domains}:
        with pytest.raises(ConfigError):
            BatchNorm2d(NUM_CHANNELS, OWN.replace(domains=("day", name)))


def test_per_level_needs_levels():
    with pytest.raises(ConfigError, match=r"spec must not be per_level .*\(BatchNorm2d\)"):
        BatchNorm2d(NUM_CHANNELS, NormSpec.from_table5_row(2))
    with pytest.raises(ConfigError, match="spec"):
        BatchNorm2d(NUM_CHANNELS, OWN.replace(affine="per_level_and_domain"))


# ---- a single element per channel

ALONE = {
    "plain": (NormSpec(), None, 1),
    "workers": (NormSpec(workers="all"), None, 1),
    "ghost": (NormSpec(normalization_batch_size=1), None, 3),
    "renorm": (NormSpec(training="renorm"), None, 1),
    "domain": (OWN, ("day", "night", "day"), 3),
    "one_domain": (OWN, "night", 1),
}
alone_cases = pytest.mark.parametrize(("spec", "active", "n"), ALONE.values(), ids=ALONE)


@alone_cases
def test_a_single_element_is_refused_with_the_layers_path(spec, active, n):
    """torch: "Expected more than 1 value per channel when training", without a name."""
    norm = build(spec, "roi_heads.box_head.norm")
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    where = r"\(roi_heads.box_head.norm, night\)" if active else r"\(roi_heads.box_head.norm\)"
    with pytest.raises(StatisticsError, match=rf"more than 1 element per channel in training; got 1 {where}"):
        Case(spec, active=active).call(norm, {"x": draw(n, 1, 1)})
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@alone_cases
def test_a_single_element_is_normalized_by_the_population_and_said_once(spec, active, n, caplog):
    case = Case(spec.replace(single_element="population"), active=active)
    norm = build(case.spec, "roi_heads.box_head.norm")
    twin = build(case.spec).eval()
    with caplog.at_level(logging.WARNING, logger="bnext"):
        for step in range(3):
            x = draw(n, 1, 1, seed=step).requires_grad_()
            twin.load_state_dict(norm.state_dict())
            output, expected = case.call(norm, {"x": x})["x"], case.call(twin, {"x": x})["x"]
            last = slice(1, 2) if n == 3 else slice(None)  # the sample that is alone
            torch.testing.assert_close(output[last], expected[last], rtol=1e-12, atol=1e-12)
            grads = [torch.autograd.grad(y[last].sum(), x, retain_graph=True)[0] for y in (output, expected)]
            torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    (record,) = caplog.records
    assert "roi_heads.box_head.norm" in record.getMessage()
    assert record.levelno == logging.WARNING


def test_at_inference_a_single_element_is_normalized_by_the_population():
    norm = build(NormSpec(inference="mini_batch")).eval()
    plain = build(NormSpec()).eval()
    torch.testing.assert_close(norm(draw(1, 1, 1)), plain(draw(1, 1, 1)), rtol=1e-12, atol=1e-12)
    without = build(NormSpec(population="none", inference="mini_batch")).eval()
    with pytest.raises(StatisticsError, match="more than 1 element"):
        without(draw(1, 1, 1))


def test_no_single_element_is_met_where_several_share_a_mini_batch():
    shared = OWN.replace(statistics="shared")
    norm = build(shared)
    before = {name: norm.population_state(name).running_mean.clone() for name in DOMAINS}
    with use_domain(["day", "night", "day"]):
        norm(draw(3, 1, 1))
    moved = {n for n in DOMAINS if not torch.equal(norm.population_state(n).running_mean, before[n])}
    assert moved == {"day"}, "one element has no variance to remember"


@pytest.mark.parametrize("second", ["channels_last", "evaluation"])
def test_a_later_call_does_not_spoil_the_graph_of_an_earlier_one(second):
    norm, alone = (randomize(BatchNorm2d(NUM_CHANNELS).double()) for _ in range(2))
    norm.train(second != "evaluation")
    alone.train(second != "evaluation")
    images = torch.randn(3, NUM_CHANNELS, 4, 5, dtype=torch.float64, requires_grad=True)
    output = norm(images)
    norm.train()(images.detach().contiguous(memory_format=torch.channels_last) * 3)
    (gradient,) = torch.autograd.grad(output.square().sum(), images)
    (expected,) = torch.autograd.grad(alone(images).square().sum(), images)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_a_domain_that_is_not_used_may_be_broken():
    spec = NormSpec(population="per_domain", domains=("day", "night"))
    norm = BatchNorm2d(NUM_CHANNELS, spec).eval()
    norm.night.running_var.fill_(float("nan"))
    x = torch.zeros(2, NUM_CHANNELS, 3, 3)
    with use_domain("day"):
        assert torch.isfinite(norm(x)).all()
    for domain in ("night", ["day", "night"]):
        with use_domain(domain), pytest.raises(StatisticsError, match="night"):
            norm(x)


@pytest.mark.parametrize("name", ["population", "affine", "domains"])
def test_who_owns_what_cannot_be_changed_in_place(name):
    norm = BatchNorm2d(NUM_CHANNELS, OWN)
    value = {"population": "shared", "affine": "none", "domains": ("day", "dusk")}[name]
    with pytest.raises(ConfigError, match=rf"{name} of a norm's spec must stay .* Use convert_norm"):
        norm.spec = norm.spec.replace(**{name: value})
    assert norm.spec == OWN


def test_a_reset_reaches_what_domains_own():
    norm = randomize(BatchNorm2d(NUM_CHANNELS, OWN))
    norm.reset_parameters()
    fresh = BatchNorm2d(NUM_CHANNELS, OWN)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("answers", [{"training": "renorm"}, {"single_element": "population"}])
def test_broken_statistics_are_refused_where_training_needs_them(answers):
    norm = BatchNorm2d(NUM_CHANNELS, NormSpec(**answers)).train()
    norm.path = "backbone.stem.norm"
    norm.running_var.fill_(float("nan"))
    shape = (2, NUM_CHANNELS, 3, 3) if "training" in answers else (1, NUM_CHANNELS, 1, 1)
    with pytest.raises(StatisticsError, match=r"must be finite .*\(backbone.stem.norm\)"):
        norm(torch.zeros(shape))


def test_a_domain_that_is_not_tracked_stays_in_a_mixed_batch():
    norm = BatchNorm2d(NUM_CHANNELS, OWN).train()
    norm.day.track_running_stats = False
    with use_domain(["day", "night"]):
        norm(torch.randn(2, NUM_CHANNELS, 3, 3))
    assert (int(norm.day.num_batches_tracked), int(norm.night.num_batches_tracked)) == (0, 1)


def test_no_gradient_is_computed_for_a_feature_that_needs_none():
    norm, images = BatchNorm2d(NUM_CHANNELS, NormSpec(training="renorm")), torch.randn(2, NUM_CHANNELS, 3, 3)
    output = norm(images)
    assert output.grad_fn.next_functions[-1][0] is None
    output.square().sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("mode", ["plain", "frozen", "evaluation"])
def test_every_domains_affine_gets_a_gradient(mode):
    """DistributedDataParallel waits for them."""
    norm = BatchNorm2d(NUM_CHANNELS, OWN.replace(frozen="statistics" if mode == "frozen" else "none"))
    norm.train(mode != "evaluation")
    with use_domain("day"):
        norm(torch.randn(2, NUM_CHANNELS, 3, 3)).square().sum().backward()
    assert norm.day.weight.grad.any()
    assert not norm.night.weight.grad.any()


def test_statistics_that_somebody_breaks_later_are_noticed():
    norm = BatchNorm2d(NUM_CHANNELS).eval()
    norm.path = "backbone.stem.norm"
    images = torch.zeros(2, NUM_CHANNELS, 3, 3)
    norm(images)
    norm.running_var.fill_(-1.0)
    with pytest.raises(StatisticsError, match=r"got mean 0.0 and variance -1.0 .*backbone.stem.norm"):
        norm(images)


@pytest.mark.parametrize("wrong", [None, [1.0], "x"])
def test_what_is_no_tensor_is_refused_with_the_layers_path(wrong):
    with pytest.raises(StatisticsError, match=rf"must be a tensor .* got {type(wrong).__name__} \(BatchNorm2d\)"):
        BatchNorm2d(NUM_CHANNELS)(wrong)


@pytest.mark.parametrize("answers", [{}, {"normalization_batch_size": 2}, {"frozen": "statistics"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64])
def test_another_type_is_refused_with_the_layers_path(answers, dtype):
    norm = BatchNorm2d(NUM_CHANNELS, NormSpec(**answers))
    with pytest.raises(StatisticsError, match=r"norm's type, torch.float32, .* got torch.\w+ \(BatchNorm2d\)"):
        norm(torch.ones(2, NUM_CHANNELS, 3, 3, dtype=dtype))


@pytest.mark.parametrize("spec", ["SyncBN", {"workers": "all"}, 3])
def test_a_spec_is_a_spec(spec):
    with pytest.raises(ConfigError, match="spec must be a NormSpec; got .* make_named_norm"):
        BatchNorm2d(NUM_CHANNELS, spec)


def test_half_statistics_of_wide_features_stay_finite():
    images = (torch.randn(4, NUM_CHANNELS, 16, 16) * 300 + 2000).half()
    norm, wide = BatchNorm2d(NUM_CHANNELS).half(), nn.BatchNorm2d(NUM_CHANNELS)
    norm(images)
    wide(images.float())
    torch.testing.assert_close(norm.running_var.float(), wide.running_var, rtol=2e-3, atol=0)


def test_an_evaluated_norm_can_be_traced():
    model = nn.Sequential(nn.Conv2d(3, NUM_CHANNELS, 1), randomize(BatchNorm2d(NUM_CHANNELS))).eval()
    with pytest.warns((FutureWarning, DeprecationWarning), match="jit"):
        traced = torch.jit.trace(model, torch.randn(1, 3, 4, 4))
    images = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(traced(images), model(images))

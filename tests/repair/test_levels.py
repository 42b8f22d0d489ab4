"""Repair of heads of others: statistics of each level, and no forward whose levels are others than was thought."""

import contextlib
import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.errors import ConfigError, StatisticsError
from bnext.layers.cycle_batch_norm import SizeRatios
from tests.repair.heads import LEVELS, LoopingDetector, TowerDetector, TowerHead, make_images, make_torchvision, settle

IMAGES = make_images()


def make_repaired(**options):
    torch.manual_seed(0)
    model = settle(TowerDetector(), IMAGES, times=3)
    report = bnext.repair(model, IMAGES, **options)
    return model, report


def copy_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_state(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# ---- what it is good for


@pytest.mark.parametrize("detector", [TowerDetector, LoopingDetector])
def test_outputs_at_inference_are_those_of_training_again(detector):
    """The loss of a head against what it gave in training, where each call had a mini-batch of its own."""
    torch.manual_seed(0)
    model = settle(detector(), IMAGES)

    def measure(model):
        losses = []
        with torch.no_grad():
            for batch in IMAGES:
                trained = copy.deepcopy(model).train()
                trained.backbone.eval()
                losses += [F.mse_loss(*pair) for pair in zip(model(batch), trained(batch), strict=True)]
        return float(torch.stack(losses).mean())

    before = measure(model)
    bnext.repair(model, IMAGES)
    assert measure(model) < before / 5


def test_torchvision_retinanet_has_its_loss_of_training():
    torch.manual_seed(0)
    model = make_torchvision()
    images = [list(batch) for batch in make_images(sizes=((64, 64),) * 3)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(30):
        losses = model(images[step % 3], [target] * 4)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    def measure(is_by_mini_batch=False):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and not is_by_mini_batch:
                module.eval()
        with torch.no_grad(), bnext.frozen_statistics(model):
            return sum(float(sum(model(batch, [target] * 4).values())) for batch in images) / 3

    trained, before = measure(is_by_mini_batch=True), measure()
    report = bnext.repair(model.eval(), images, levels=LEVELS)
    assert len(report.levels) == 8
    after = measure()
    assert abs(after - trained) < 0.2 * abs(before - trained), (trained, before, after)


def test_statistics_are_those_of_each_level_alone():
    """In float64 against moments of all that reached each level, and outputs by torch's own function."""
    torch.manual_seed(0)
    model = TowerDetector().double().eval()
    batches = [batch.double() for batch in IMAGES]
    first, *_ = model.head.cls_tower
    old = copy.deepcopy(model.head.cls_tower[1])
    with torch.no_grad():
        features = [[first(feature) for feature in model.backbone(batch).values()] for batch in batches]
    bnext.repair(model, batches, levels=LEVELS)

    norm, eps = model.head.cls_tower[1], old.eps
    for index, level in enumerate(LEVELS):
        elements = torch.cat([of_batch[index].transpose(0, 1).flatten(1) for of_batch in features], 1)
        state = norm.population_state(level)
        torch.testing.assert_close(state.running_mean, elements.mean(1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.running_var, elements.var(1), rtol=1e-10, atol=1e-12)
        expected = F.batch_norm(features[0][index], elements.mean(1), elements.var(1), old.weight, old.bias, eps=eps)
        with bnext.use_level(level):
            torch.testing.assert_close(norm(features[0][index]), expected, rtol=1e-9, atol=1e-10)


def test_the_report_names_norms_levels_and_what_was_left():
    torch.manual_seed(0)
    twice = nn.BatchNorm2d(6)
    model = TowerDetector()
    model.head.cls_logits = nn.Sequential(twice, nn.ReLU(), twice, model.head.cls_logits)
    model.head.order = (0, 0, 0)
    model.head.bbox_tower = nn.Identity()
    with pytest.raises(StatisticsError, match="features of one size"):
        bnext.repair(model, IMAGES)
    report = bnext.repair(model, IMAGES, layers=lambda path, norm: path == "head.cls_tower.1")
    assert report.levels == {"head.cls_tower.1": ("0", "1", "2")}
    model, report = make_repaired(levels=LEVELS)
    assert list(report.levels) == [f"head.{tower}_tower.{index}" for tower in ("cls", "bbox") for index in (1, 4)]
    assert "4 norms have statistics for each of p3, p4, p5" in str(report)
    assert "re-estimate them" not in str(report)
    assert not report.left


# ---- calls that are others


@pytest.mark.parametrize("order", [(1, 2), (0, 2), (0, 1), (0, 2, 1), (0, 1, 2, 2), (2, 1, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_with_other_calls_is_refused_and_moves_nothing(order, training):
    model, _ = make_repaired()
    model.train(training)
    before = copy_state(model.head)
    model.head.order = order
    with pytest.raises(StatisticsError, match=r"head\.cls_tower\.1"):
        model(IMAGES[0])
    assert is_state(model.head, before)
    model.head.order = (0, 1, 2)
    model(IMAGES[1])
    assert is_state(model.head, before) != training


@pytest.mark.parametrize("order", [(0, 1), (0, 2), (1, 0, 2)])
def test_a_head_whose_calls_change_is_refused_and_nothing_is_changed(order):
    class Changing(TowerHead):
        def forward(self, features):
            self.order = order if features[0].shape[2] == IMAGES[1].shape[2] // 2 else (0, 1, 2)
            return super().forward(features)

    model = TowerDetector(Changing())
    before, hooks = copy_state(model), dict(model._forward_hooks)
    with pytest.raises(StatisticsError, match=r"head\.cls_tower\.1"):
        bnext.repair(model, IMAGES)
    assert is_state(model, before)
    assert isinstance(model.head.cls_tower[1], nn.BatchNorm2d)
    assert type(model.head.cls_tower[1]) is nn.BatchNorm2d
    assert model._forward_hooks == hooks


def test_after_an_exception_the_next_forward_begins_anew():
    model, _ = make_repaired()
    expected = model(IMAGES[0])
    for error in (OSError("on purpose"), KeyboardInterrupt()):
        model.head.breaks = True
        with pytest.raises(OSError, match="on purpose"):
            model(IMAGES[0])
        model.head.breaks = False

        def stop(module, args, output, error=error):
            raise error

        handle = model.head.cls_tower[2].register_forward_hook(stop)
        with pytest.raises(type(error)):
            model(IMAGES[0])
        handle.remove()
        assert all(torch.equal(*pair) for pair in zip(model(IMAGES[0]), expected, strict=True))


def test_what_is_called_from_outside_is_named_or_refused():
    model, _ = make_repaired()
    expected = model(IMAGES[0])
    features = list(model.backbone(IMAGES[0]).values())
    for call in (lambda: model.inference(IMAGES[0]), lambda: model.head(features)):
        with pytest.raises(StatisticsError, match="count_levels"):
            call()

    bnext.count_levels(model, ("inference", "head"))
    assert all(torch.equal(*pair) for pair in zip(model.inference(IMAGES[0]), expected, strict=True))
    assert torch.equal(model.head(features)[0][2], expected[2][:, :2])
    model.head.order = (0, 1)
    with pytest.raises(StatisticsError, match="got 2"):
        model.inference(IMAGES[0])
    for entry in ("nothing", "head.nothing", "", ()):
        with pytest.raises(ConfigError, match="entry"):
            bnext.count_levels(model, entry)
    with pytest.raises(StatisticsError, match="entry="):
        bnext.repair(TowerDetector(), IMAGES, forward=lambda model, batch: model.inference(batch))


def test_a_method_that_was_put_on_the_model_stays():
    def double(model, images):
        return [2 * output for output in TowerDetector.inference(model, images)]

    model, _ = make_repaired()
    expected = model(IMAGES[0])
    model.inference = types.MethodType(double, model)
    handle = bnext.count_levels(model, "inference")
    for other in (model, copy.deepcopy(model)):
        assert all(torch.equal(two, 2 * one) for two, one in zip(other.inference(IMAGES[0]), expected, strict=True))
    handle.remove()
    assert model.inference.__func__ is double


def test_of_entries_within_one_another_the_outermost_counts():
    torch.manual_seed(0)
    model = LoopingDetector().eval()
    bnext.repair(model, IMAGES)
    expected = model(IMAGES[0])
    bnext.count_levels(model, "head")
    assert all(torch.equal(*pair) for pair in zip(model(IMAGES[0]), expected, strict=True))

    def catch(feature, call=model.head.forward):
        call(feature)
        raise OSError("on purpose")

    def forward(images):
        features = list(model.backbone(images).values())
        model.head.forward = catch
        with contextlib.suppress(OSError):
            model.head(features[0])
        del model.head.forward
        return model.head(features[1])

    model.forward = forward
    with pytest.raises(StatisticsError, match="got 2"):
        model(IMAGES[0])


def test_a_head_that_names_its_levels_may_leave_one_out():
    class Naming(TowerHead):
        def forward(self, features):
            outputs = []
            for level in self.order:
                with bnext.use_level(LEVELS[level]):
                    outputs.append(self.cls_logits(self.cls_tower(features[level])))
            return outputs, outputs

    model = TowerDetector(Naming())
    report = bnext.repair(model, IMAGES)
    assert set(report.levels.values()) == {LEVELS}
    expected = model(IMAGES[0])
    model.head.order = (2, 1)
    assert torch.equal(model(IMAGES[0])[0], expected[2])
    with pytest.raises(StatisticsError, match="p9"), bnext.use_level("p9"):
        model.head.cls_tower(torch.ones(1, 6, 4, 4))
    with pytest.raises(ConfigError, match="name"):
        bnext.use_level(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ("p3", "p4")}, "levels"),
        ({"levels": ("p3", "p3", "p4")}, "levels"),
        ({"levels": "p3p"}, "levels"),
        ({"entry": "infer"}, "entry"),
        ({"estimator": "best"}, "estimator"),
        ({"layers": lambda path, norm: False}, "called on several levels"),
    ],
)
def test_bad_arguments_change_nothing(options, message):
    model = TowerDetector()
    before = copy_state(model)
    with pytest.raises((ConfigError, StatisticsError), match=message):
        bnext.repair(model, IMAGES, **options)
    assert is_state(model, before)
    assert not model._forward_pre_hooks


def test_frozen_norms_are_named_where_there_is_nothing_to_repair():
    model = TowerDetector()
    bnext.freeze_norms(model, select=lambda path, norm: path.startswith("head."))
    with pytest.raises(StatisticsError, match=r"passed over \(head\.cls_tower\.1"):
        bnext.repair(model, IMAGES)


def test_data_that_break_off_change_nothing():
    def break_off():
        yield from IMAGES
        yield torch.full((2, 3, 32, 32), torch.nan)

    model = TowerDetector()
    before = copy_state(model)
    for data in (break_off(), [], iter(())):
        with pytest.raises(StatisticsError):
            bnext.repair(model, data)
        assert is_state(model, before)


# ---- a model that goes on


def test_copies_and_files_count_for_themselves(tmp_path):
    model, _ = make_repaired(entry=("forward", "inference"))
    expected = model(IMAGES[0])
    torch.save(model, tmp_path / "model.pth")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pth", weights_only=False),
    ):
        for call in (other, other.inference):
            assert all(torch.equal(*pair) for pair in zip(call(IMAGES[0]), expected, strict=True))
        other.head.order = (0, 1)
        with pytest.raises(StatisticsError):
            other.inference(IMAGES[0])
    assert all(torch.equal(*pair) for pair in zip(model(IMAGES[0]), expected, strict=True))


def test_a_state_dict_is_loaded_into_a_model_of_such_norms():
    model, _ = make_repaired()
    other = TowerDetector(TowerHead(norm=lambda channels: bnext.CycleBatchNormList(3, num_features=channels)))
    bnext.count_levels(other)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(other.eval()(IMAGES[0]), model(IMAGES[0]), strict=True))
    third = TowerDetector()
    bnext.convert_norm(third, {"head": lambda channels: bnext.CycleBatchNormList(3, num_features=channels)})
    bnext.count_levels(third)
    third.load_state_dict(model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(third.eval()(IMAGES[0]), model(IMAGES[0]), strict=True))
    again = bnext.repair(third, IMAGES)
    assert set(again.levels.values()) == {("0", "1", "2")}


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_activations_computed_again_have_the_levels_of_their_forward(is_reentrant):
    model, _ = make_repaired()
    model.train()
    batch = IMAGES[0].requires_grad_()
    plain = copy.deepcopy(model)
    tower = model.head.cls_tower.forward
    model.head.cls_tower.forward = lambda feature: checkpoint(tower, feature, use_reentrant=is_reentrant)
    sum(output.square().sum() for output in model(batch)).backward()
    sum(output.square().sum() for output in plain(batch)).backward()
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, msg=name)
    assert is_state(model, copy_state(plain))


def test_a_forward_that_is_exported_has_its_levels():
    model, _ = make_repaired()
    expected = model(IMAGES[0])
    program = torch.export.export(model, (IMAGES[0],)).module()
    assert all(torch.equal(*pair) for pair in zip(program(IMAGES[0]), expected, strict=True))


@pytest.mark.slow
def test_a_forward_that_is_compiled_has_its_levels():
    torch.manual_seed(0)
    model = LoopingDetector()
    bnext.repair(model, IMAGES)
    compiled, plain = torch.compile(model, backend="eager"), copy.deepcopy(model)
    for training in (True, False):
        model.train(training)
        plain.train(training)
        for batch in IMAGES[:2]:
            assert all(torch.equal(*pair) for pair in zip(compiled(batch), plain(batch), strict=True))
    assert is_state(model, copy_state(plain))


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1), (0, 2, 1)])
def test_a_forward_that_is_compiled_and_has_other_calls_is_refused(order):
    model, _ = make_repaired()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IMAGES[0])
    model.head.order = order
    for training, words in ((False, "as they were before"), (True, "have moved")):
        with torch.no_grad(), pytest.raises(StatisticsError, match=words):
            compiled.train(training)(IMAGES[0])


def test_a_wrapped_model_counts_each_forward():
    model, _ = make_repaired()
    expected = model(IMAGES[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(wrapped(IMAGES[0]), expected, strict=True))
        with pytest.raises(ConfigError, match="DistributedDataParallel"):
            bnext.repair(DistributedDataParallel(TowerDetector()), IMAGES)
    finally:
        dist.destroy_process_group()


def test_convolutions_take_in_no_norm_of_several_levels():
    model, _ = make_repaired()
    report = bnext.fold_norms(model, pairs=[("backbone.stem.0", "backbone.stem.1")])
    assert report.folded == {"backbone.stem.1": "backbone.stem.0"}
    assert "one after the other" in report.left["head.cls_tower.1"]


# ---- relative sizes


@given(
    st.lists(st.integers(2, 200), min_size=2, max_size=6),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.permutations(range(5)),
)
def test_sizes_of_one_pyramid_fit_whatever_the_image_and_the_order(lengths, rounds_up, order):
    ratios = SizeRatios()
    for length in lengths:
        sizes = [length]
        for is_up in rounds_up:
            sizes.append(max(1, (sizes[-1] + is_up) // 2))
        calls = [(sizes[level], sizes[level]) for level in order]
        assert all(ratios.fits(index, calls[0], size) for index, size in enumerate(calls))
        ratios.take_in(calls)


def test_sizes_of_another_level_do_not_fit():
    ratios = SizeRatios()
    ratios.take_in([(100, 160), (50, 80), (25, 40), (13, 20), (7, 10)])
    assert ratios.fits(3, (64, 64), (8, 8))
    assert not ratios.fits(1, (64, 64), (16, 16))
    assert not ratios.fits(2, (64, 64), (32, 16))
    assert not ratios.fits(4, (64, 64), (8, 8))

    from_coarse = SizeRatios()
    from_coarse.take_in([(7, 10), (13, 20), (25, 40)])
    assert from_coarse.fits(2, (4, 4), (13, 16))
    assert not from_coarse.fits(2, (4, 4), (8, 8))
    assert not from_coarse.fits(1, (4, 4), (16, 16))
    assert not from_coarse.fits(1, (8, 8), (4, 4))


def test_detectron2s_own_norms_are_known_whoever_was_imported_first():
    """In a process that has not imported bnext.heads."""
    code = """
import torch, bnext
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
head = RetinaNetHead(input_shape=[ShapeSpec(channels=4)] * 2, num_classes=2, num_anchors=1, conv_dims=[4], norm="BN")
before = set(head.state_dict())
bnext.repair(head, [[torch.randn(2, 4, side, side) for side in (8, 4)] for _ in range(2)])
assert isinstance(head.cls_subnet[1], bnext.CycleBatchNormList), head
assert set(head.state_dict()) == before
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr

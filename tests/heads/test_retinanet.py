"""RetinaNet with a head of bnext: detectron2's own model where the keys are at their defaults, and all six rows."""

import copy

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as Detectron2RetinaNetHead
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from bnext import convert_norm_state, recompute_population_statistics
from bnext.errors import StatisticsError
from bnext.heads import forward_statistics
from bnext.layers import LevelBatchNorm2d
from tests.cases import ROWS
from tests.heads.detectors import LEVELS, make_batch, make_detector, run_step


def norms_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, LevelBatchNorm2d)}


def test_default_keys_are_detectron2s_own_retinanet():
    """Losses, gradients and buffers of two steps, then detections; from one and the same checkpoint."""
    stock, ours = make_detector("RetinaNet"), make_detector("BNextRetinaNet", seed=1)
    state, report = convert_norm_state(stock.state_dict(), ours)
    assert ours.load_state_dict(state, strict=True)
    assert "numbered levels were read in the order p3, p4, p5, p6, p7" in str(report)
    batches = [make_batch(seed=seed) for seed in range(2)]
    for step in range(2):
        expected, expected_gradients = run_step(stock, batches[step])
        losses, gradients = run_step(ours, batches[step])
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            scale = float(expected_gradients[name].abs().max())
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-4 * scale + 1e-7, msg=name)
    converted, _ = convert_norm_state(stock.state_dict(), ours)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, converted[name], rtol=1e-4, atol=1e-5, msg=name)
    stock.load_state_dict(dict(stock.state_dict()))
    ours.load_state_dict(converted)
    for model in (stock, ours):
        model.eval().test_score_thresh = 0.0
    with torch.no_grad():
        found, expected = (model(make_batch(seed=5))[0]["instances"] for model in (ours, stock))
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_no_norm_is_detectron2s_model():
    stock, ours = make_detector("RetinaNet", ""), make_detector("BNextRetinaNet", "", seed=1)
    ours.load_state_dict(stock.state_dict(), strict=True)
    expected, expected_gradients = run_step(stock, make_batch())
    losses, gradients = run_step(ours, make_batch())
    assert losses == expected
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_other_norms_are_passed_through(norm):
    """The same weights in detectron2's own head, which calls each level alone."""
    head = make_detector(norm=norm).head
    assert type(head.cls_subnet[1]) is {"GN": nn.GroupNorm, "FrozenBN": FrozenBatchNorm2d}[norm]
    assert norm != "GN" or head.cls_subnet[1].num_groups == 32
    features = [torch.randn(2, 32, side, side) for side in (8, 4, 2, 1, 1)]
    expected = Detectron2RetinaNetHead.forward(head, features)
    for actual, right in zip(head(features), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_a_step_and_infers(row):
    model = make_detector(row=row)
    norms = norms_of(model)
    assert set(norms) == {f"head.{tower}_subnet.{index}" for tower in ("cls", "bbox") for index in (1, 4)}
    assert {(norm.spec.table5_row, norm.levels, norm.path == path) for path, norm in norms.items()} == {
        (row, LEVELS, True)
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses, gradients = run_step(model, make_batch((64, 96)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_buffers() if name.startswith("head") and name in before}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        results = model(make_batch((64, 96)))
    assert len(results) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("row", [1, 6])
def test_every_affine_is_exempt_from_weight_decay(row):
    model = make_detector(row=row)
    groups = get_default_optimizer_params(model, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    affine = {id(parameter) for norm in norms_of(model).values() for parameter in norm.parameters()}
    assert {decay[key] for key in affine} == {0.0}
    assert {value for key, value in decay.items() if key not in affine} == {1e-4}


@pytest.mark.parametrize("row", [3, 6])
def test_a_checkpoint_file_restores_the_detections(row, tmp_path):
    model, other = make_detector(row=row), make_detector(row=row, seed=1)
    run_step(model, make_batch())
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("model")
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    for detector in (model, other):
        detector.eval().test_score_thresh = 0.0
    with torch.no_grad():
        found, expected = (detector(make_batch())[0]["instances"] for detector in (other, model))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_a_failed_forward_misaligns_no_level():
    model, same = make_detector(), make_detector()
    head, batch = model.head, make_batch()
    with pytest.raises(StatisticsError, match=r"\(head\.cls_subnet\.1, p5\)"):
        head([torch.zeros(1, 32, side, side) for side in (4, 2, 1, 1, 1)])
    assert run_step(model, batch)[0] == run_step(same, batch)[0]
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())


def test_forward_statistics_moves_what_training_moves_and_needs_no_labels():
    model, trained = make_detector(row=3), make_detector(row=3)
    run_step(trained, make_batch())
    unlabelled = [{"image": record["image"]} for record in make_batch()]
    with torch.no_grad():
        forward_statistics(model.train(), unlabelled)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_detector_copies_and_keeps_its_initialization():
    model = copy.deepcopy(make_detector(row=6))
    score = model.head.cls_score
    torch.testing.assert_close(torch.sigmoid(score.bias), torch.full_like(score.bias, 0.01))
    convs = [m for m in model.head.modules() if isinstance(m, nn.Conv2d)]
    assert all(abs(float(conv.weight.detach().std()) - 0.01) < 2e-3 for conv in convs)


@pytest.mark.parametrize("row", [1, 4])
def test_statistics_of_a_detector_by_the_short_forward_and_by_the_whole_one(row):
    short, whole = make_detector(row=row), make_detector(row=row)
    data = [make_batch(seed=seed) for seed in range(2)]
    report = recompute_population_statistics(short, data, forward=forward_statistics)
    recompute_population_statistics(whole, data)
    assert not report.not_reached
    assert len(report.estimates) == 4 * (len(LEVELS) if row == 4 else 1)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in short.state_dict().items())

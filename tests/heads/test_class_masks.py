"""Losses on images that do not annotate all classes: those of a slow definition over the columns that are left."""

import copy
import functools
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_ioa
from detectron2.utils.events import EventStorage

from bnext.errors import ConfigError, DatasetError
from bnext.heads.class_masks import check_maskable, mask_classes
from tests import reference, tiny
from tests.evaluation.own_sets import make_set, registered
from tests.heads.detectors import CASCADE, NUM_CLASSES, make_batch, make_cfg, make_detector, make_model, run_step

ALL = list(range(NUM_CLASSES))
# Of two images with objects of the classes 0 and 1: the first hides class 1, and its left part.
ANNOTATED = ([0, 2], ALL)
IGNORED = ([[0.0, 0.0, 40.0, 64.0]], [])
DENSE = ["BNextRetinaNet", "BNextFCOS"]


@functools.cache
def build(architecture):
    if architecture in DENSE:
        return make_detector(architecture)
    return make_model(*CASCADE if architecture == "Cascade" else (), architecture="BNextGeneralizedRCNN")


def make(architecture):
    return copy.deepcopy(build(architecture))


def make_partial_batch(annotated=ANNOTATED, ignored=((), ())):
    batch = make_batch()
    for record, classes, boxes in zip(batch, annotated, ignored, strict=True):
        if classes is not None:
            record["annotated_classes"] = classes
        if len(boxes):
            record["ignored_boxes"] = torch.tensor(boxes)
    return batch


def watch(module, outputs):
    """Keep what a module gives, logits with their gradients."""

    def keep(module, args, output):
        for logits in output[0] if isinstance(output[0], list) else [output[0]]:
            if isinstance(logits, torch.Tensor):
                logits.retain_grad()
        outputs.append(output)

    module.register_forward_hook(keep)


def find_ignored(boxes, labels, image):
    """The anchors or RoIs of the background in the ignored part of an image."""
    if not IGNORED[image]:
        return torch.zeros(len(labels), dtype=torch.bool)
    ignored = (pairwise_ioa(Boxes(torch.tensor(IGNORED[image])), boxes)[0] >= 0.5) & (labels == NUM_CLASSES)
    assert ignored.any()
    assert (~ignored & (labels == NUM_CLASSES)).any()
    return ignored


@pytest.mark.parametrize("architecture", DENSE)
def test_the_focal_loss_is_the_sum_over_what_is_annotated(architecture):
    model, outputs, batch = make(architecture), [], make_partial_batch(ignored=IGNORED)
    watch(model.head, outputs)
    losses, _ = run_step(model, batch)

    logits = outputs[0][0]
    leaves = [of_level.detach().requires_grad_() for of_level in logits]
    flat = torch.cat(model._transpose_dense_predictions([leaves], [NUM_CLASSES])[0], dim=1)
    anchors = model.anchor_generator([torch.zeros(1, 1, *of_level.shape[-2:]) for of_level in logits])
    labels, _ = model.label_anchors(anchors, [record["instances"] for record in batch])
    expected = 0
    for image, classes in enumerate(ANNOTATED):
        of_image = labels[image].masked_fill(find_ignored(Boxes.cat(anchors), labels[image], image), -1)
        expected += reference.annotated_focal_loss(flat[image], of_image, classes, alpha=0.25, gamma=2.0)
    expected = expected / model.loss_normalizer
    assert torch.allclose(next(iter(losses.values())).double(), expected, rtol=1e-5)

    expected.backward()
    for of_level, leaf in zip(logits, leaves, strict=True):
        torch.testing.assert_close(of_level.grad, leaf.grad, rtol=1e-4, atol=1e-9)
        columns = of_level.grad.reshape(2, -1, NUM_CLASSES, *of_level.shape[-2:])
        assert not columns[0, :, 1].any(), "exactly 0"
        assert columns[1, :, 1].any(), "of the other image"


@pytest.mark.parametrize("architecture", ["Faster", "Cascade"])
def test_the_softmax_of_rois_is_over_what_is_annotated_and_the_background(architecture):
    model, predictions, results = make(architecture), [], []
    stages = model.roi_heads.box_predictor if architecture == "Cascade" else [model.roi_heads.box_predictor]
    for predictor in stages:
        watch(predictor, predictions)
    watch(model.roi_heads, results)
    losses, _ = run_step(model, make_partial_batch(ignored=IGNORED))

    proposals, logits = results[0][0], predictions[0][0]  # of the first stage
    leaf = logits.detach().requires_grad_()
    parts = leaf.split([len(each) for each in proposals])
    expected = 0
    for image, (part, each) in enumerate(zip(parts, proposals, strict=True)):
        seen = ~find_ignored(each.proposal_boxes, each.gt_classes, image)
        expected += reference.annotated_cross_entropy(part[seen], each.gt_classes[seen], ANNOTATED[image])
    expected = expected / len(leaf)
    actual = losses["loss_cls_stage0" if architecture == "Cascade" else "loss_cls"]
    assert torch.allclose(actual.double(), expected, rtol=1e-5)

    expected.backward()
    torch.testing.assert_close(logits.grad, leaf.grad, rtol=1e-4, atol=1e-9)
    for each, _ in predictions:  # of every stage
        assert not each.grad[: len(parts[0]), 1].any(), "exactly 0"


def test_negatives_of_an_rpn_in_ignored_boxes_are_none():
    model, batch = make("Faster"), make_partial_batch(ignored=([[0.0, 0.0, 64.0, 64.0]], ()))
    outputs = []
    watch(model.proposal_generator.rpn_head, outputs)
    run_step(model, batch)
    signs = [torch.cat([of_level.grad[image].flatten() for of_level in outputs[0][0]]).sign() for image in (0, 1)]
    assert [set(of_image.tolist()) for of_image in signs] == [{-1.0, 0.0}, {-1.0, 0.0, 1.0}], "objects alone, both"


@pytest.mark.parametrize("architecture", ["BNextRetinaNet", "Faster"])
def test_where_all_classes_are_annotated_it_is_bitwise_detectron2(architecture):
    masked = run_step(make(architecture), make_partial_batch([ALL, None]))
    model = pickle.loads(pickle.dumps(build(architecture)))
    for module in model.modules():
        vars(module).pop("losses", None)

    for actual, right in zip(masked, run_step(model, make_batch()), strict=True):
        assert actual.keys() == right.keys()
        assert all(torch.equal(actual[name], right[name]) for name in right)


def test_a_copy_hides_what_its_own_batch_says():
    model = make("BNextRetinaNet")
    pickled = pickle.loads(pickle.dumps(model))
    expected = run_step(model, make_partial_batch())[0]["loss_cls"]
    assert torch.equal(run_step(pickled, make_partial_batch())[0]["loss_cls"], expected)
    assert run_step(make("BNextRetinaNet"), make_batch())[0]["loss_cls"] > expected


def test_a_model_of_detectron2s_gets_masks_once():
    model = build_model(make_cfg(architecture="GeneralizedRCNN"))
    before = run_step(model, make_partial_batch())[0]["loss_cls"]
    assert mask_classes(model)
    assert mask_classes(model)
    assert len(model._forward_pre_hooks) == 1
    assert run_step(model, make_partial_batch())[0]["loss_cls"] < before
    assert not mask_classes(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("classes", [[0, NUM_CLASSES], [-1, 0], [1]])
def test_a_record_that_contradicts_the_model_or_itself_is_refused(classes):
    model = make("BNextFCOS")
    with EventStorage(), pytest.raises(DatasetError, match="annotated_classes"):
        model.train()(make_partial_batch([classes, None]))
    with EventStorage():
        model(make_batch())


def test_a_model_without_such_a_loss_is_refused_for_partial_sets(tmp_path):
    with registered(tmp_path, val=make_set(2)):
        pairs = ("DATASETS.TRAIN", "('own_train',)")
        cfg = tiny.load(tmp_path, *pairs, "DATASETS.BNEXT.CLASSES", "('cat', 'dog', 'owl', 'car')")
        with pytest.raises(ConfigError, match="own_train"):
            check_maskable(cfg, torch.nn.Linear(1, 1))
        check_maskable(cfg, build("BNextFCOS"))
        check_maskable(tiny.load(tmp_path, *pairs), torch.nn.Linear(1, 1))

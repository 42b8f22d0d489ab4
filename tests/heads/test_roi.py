"""RoIs know their image: mini-batches at inference are of one image, and RoIs have the domain of theirs."""

import contextlib

import pytest
import torch
from detectron2.config import configurable
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from bnext import use_domain
from bnext.errors import ConfigError, DomainError, StatisticsError
from bnext.heads import mixing_images
from bnext.scope import get_record
from tests.heads.detectors import C4, CASCADE, make_batch, make_model, norms_of, run_step, shuffle_pairs

HEADS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
NORMS = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "BN")
MINI_BATCH = (*NORMS, *(item for head in HEADS for item in (f"MODEL.BNEXT.{head}.INFERENCE", "mini_batch")))
GIVEN = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
RCNN = "BNextGeneralizedRCNN"


def make_proposals(number, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * side / 2
    proposals = Instances((side, side))
    proposals.proposal_boxes = Boxes(torch.cat([corners, corners + 8 + torch.rand(number, 2) * 20], 1))
    proposals.objectness_logits = torch.zeros(number)
    return proposals


def give_proposals(batch, numbers):
    return [
        {**record, "proposals": make_proposals(number, record["height"], seed)}
        for seed, (record, number) in enumerate(zip(batch, numbers, strict=True))
    ]


def infer(model, batch):
    model.eval()
    with torch.no_grad():
        return [result["instances"] for result in model(batch)]


def assert_same(first, second):
    assert first.get_fields().keys() == second.get_fields().keys() >= {"scores", "pred_boxes"}
    assert len(first) == len(second)
    for name, value in first.get_fields().items():
        own, other = (v.tensor if isinstance(v, Boxes) else v.float() for v in (value, second.get(name)))
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-3)


def spread(first, second):
    return float((first.pred_keypoint_heatmaps - second.pred_keypoint_heatmaps).abs().max())


def test_an_images_result_does_not_depend_on_the_others():
    """Of all three heads; a norm over all RoIs, as detectron2 would have it, is seen to fail the same check."""
    model, batch = make_model(*MINI_BATCH), make_batch((64, 64, 64))
    together = infer(model, batch)
    assert all(len(result) == 4 for result in together)
    for record, result in zip(batch, together, strict=True):
        assert_same(result, infer(model, [record])[0])
    for part in model.modules():
        part._forward_pre_hooks.clear()
    assert spread(infer(model, batch)[0], together[0]) > 0.01


@pytest.mark.parametrize("numbers", [(5, 0, 1), (1, 0), (0, 0), (0, 3), (1,), (0,)])
@pytest.mark.parametrize("cascade", [False, True])
def test_images_with_one_roi_or_none(numbers, cascade):
    model = make_model(*MINI_BATCH, *GIVEN, *(CASCADE if cascade else ()), architecture=RCNN)
    batch = give_proposals(make_batch((64,) * len(numbers)), numbers)
    for record, number, result in zip(batch, numbers, infer(model, batch), strict=True):
        assert min(number, 1) <= len(result) <= 4
        assert all(torch.isfinite(value).all() for value in (result.scores, result.pred_keypoint_heatmaps))
        assert_same(result, infer(model, [record])[0])


@pytest.mark.parametrize("numbers", [(3, 0), (1, 2), (0, 0)])
def test_masks_and_keypoints_of_given_boxes(numbers):
    model, batch = make_model(*MINI_BATCH, architecture=RCNN).eval(), make_batch()
    given = []
    for seed, number in enumerate(numbers):
        given.append(Instances((64, 64), pred_boxes=make_proposals(number, seed=seed).proposal_boxes))
        given[-1].scores, given[-1].pred_classes = torch.ones(number), torch.zeros(number, dtype=torch.long)

    def infer_given(part):
        with torch.no_grad():
            results = model.inference(batch[part], [Instances((64, 64), **one.get_fields()) for one in given[part]])
        return [result["instances"] for result in results]

    together = infer_given(slice(None))
    for index, result in enumerate(together):
        assert len(result) == numbers[index]
        assert_same(result, infer_given(slice(index, index + 1))[0])


def run_heads(model, features, sizes, proposals):
    """The RoI heads on given features: what padding does to those of an image is not theirs."""
    side = 32 * next(iter(features.values())).shape[-1]
    images = ImageList(torch.zeros(len(sizes), 3, side, side), sizes)
    copies = [Instances(one.image_size, **one.get_fields()) for one in proposals]
    with torch.no_grad():
        return model.roi_heads(images, features, copies)[0]


@pytest.mark.parametrize("pairs", [MINI_BATCH, (*MINI_BATCH, *CASCADE)])
def test_images_of_different_sizes(pairs):
    """At the heads. Features depend on the padding, so that a model without any norm fails the check of results."""
    batch, numbers = make_batch((64, 96)), (6, 3)
    model = make_model(*pairs, *GIVEN, architecture=RCNN).eval()
    check_heads_alone(model, batch, numbers)
    bare = make_model(architecture=RCNN).eval()
    together = infer(bare, batch)[0]
    with pytest.raises(AssertionError):
        assert_same(together, infer(bare, batch[:1])[0])


def check_heads_alone(model, batch, numbers):
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
    proposals = [record["proposals"] for record in give_proposals(batch, numbers)]
    together = run_heads(model, features, images.image_sizes, proposals)
    for index, result in enumerate(together):
        own = {name: value[index : index + 1] for name, value in features.items()}
        assert_same(result, run_heads(model, own, images.image_sizes[index : index + 1], [proposals[index]])[0])


@pytest.mark.parametrize("numbers", [(6, 3), (1, 4), (0, 5)])
def test_the_res5_head_of_a_c4_model(numbers):
    """Its norms are the backbone's, whose own mini-batches are of all images."""
    pairs = (*C4, "MODEL.RESNETS.NORM", "BN", "MODEL.BNEXT.RESNETS.INFERENCE", "mini_batch")
    model = make_model(*pairs, *GIVEN, architecture=RCNN).eval()
    check_heads_alone(model, make_batch((64, 96)), numbers)
    for part in model.roi_heads.modules():
        part._forward_pre_hooks.clear()
    if 0 not in numbers:
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            check_heads_alone(model, make_batch((64, 96)), numbers)


@pytest.mark.parametrize("numbers", [(6, 3), (1, 4), (0, 5)])
def test_the_mask_head_of_a_c4_model(numbers):
    """It has no pooler: the instances of the call say which RoI is of which image, in training, too."""
    keys = ("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.NORM", "BN")
    answers = ("MODEL.BNEXT.ROI_MASK_HEAD.INFERENCE", "mini_batch", "MODEL.BNEXT.ROI_MASK_HEAD.AFFINE", "per_domain")
    domains = ("MODEL.BNEXT.DOMAINS.NAMES", ("day", "night"))
    model = make_model(*C4, *keys, *answers, *domains, *GIVEN, architecture=RCNN).eval()
    batch = give_proposals(make_batch(), numbers)
    with use_domain("day"), recording_groups(model, "ROI_MASK_HEAD") as groups:
        results = infer(model, batch)
    lengths = [len(result) for result in results]
    assert groups[0].numbers.tolist() == [0] * lengths[0] + [1] * lengths[1]
    with use_domain("day"):
        check_heads_alone(model, make_batch((64, 96)), numbers)
    with use_domain(["day", "night"]):
        losses, _ = run_step(model, batch)
    assert torch.isfinite(losses["loss_mask"])


def test_keys_of_the_state_do_not_depend_on_the_settings():
    expected = make_model(*NORMS).state_dict()
    for pairs in (MINI_BATCH, *((*NORMS, *shuffle_pairs(form, *HEADS)) for form in ("statistics", "features"))):
        state = make_model(*pairs).state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


@contextlib.contextmanager
def recording_groups(model, place="ROI_BOX_HEAD"):
    """The groups that a head's norm has in its calls."""
    norm, found = next(iter(norms_of(model, place).values())), []
    handle = norm.register_forward_pre_hook(lambda norm, args: found.append(get_record().groups.get(norm)))
    yield found
    handle.remove()


def test_mixing_images():
    model = make_model(*MINI_BATCH, *GIVEN, architecture=RCNN)
    batch = give_proposals(make_batch(), (9, 4))
    before = infer(model, batch)
    with mixing_images(model), recording_groups(model) as groups:
        mixed = infer(model, batch)
        infer(model, batch)
    first, second = (own.numbers.tolist() for own in groups)
    assert [first.count(image) for image in (0, 1)] == [9, 4]  # the sizes of the images
    assert len(set(first[:9])) == 2, "random RoIs, not those of an image"
    assert first != second
    assert float((mixed[0].scores - before[0].scores).abs().max()) > 1e-5
    with recording_groups(model) as groups:
        after = infer(model, batch)
    assert groups[0].numbers.tolist() == [0] * 9 + [1] * 4
    for one, other in zip(before, after, strict=True):
        assert_same(one, other)


def test_mixing_ends_with_an_exception():
    model, batch = make_model(*MINI_BATCH), make_batch()
    before = infer(model, batch)
    with pytest.raises(RuntimeError, match="on purpose"), mixing_images(model):
        raise RuntimeError("on purpose")
    with contextlib.suppress(RuntimeError), mixing_images(model), mixing_images(model):
        raise RuntimeError
    assert_same(infer(model, batch)[0], before[0])


def test_mixing_needs_a_head_that_could():
    with (
        pytest.raises(StatisticsError, match="model must have RoI heads with batch norms of bnext"),
        mixing_images(make_model()),
    ):
        pass


def test_a_failed_call_leaves_nothing_behind():
    model, batch = make_model(*MINI_BATCH), make_batch()
    before = infer(model, batch)
    handle = model.roi_heads.mask_head.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        infer(model, batch)
    handle.remove()
    assert_same(infer(model, batch[:1])[0], before[0])
    run_step(model, batch)


def test_features_that_are_of_no_known_image():
    model = make_model(*MINI_BATCH).eval()
    with pytest.raises(StatisticsError, match=r"got 3 features for None boxes \(roi_heads\.box_head\.conv1\.norm\)"):
        model.roi_heads.box_head(torch.randn(3, 16, 7, 7))
    infer(model, make_batch())
    with pytest.raises(StatisticsError, match="got 3 features for"):
        model.roi_heads.box_head(torch.randn(3, 16, 7, 7))


def make_domains(*places, **answers):
    pairs = [*NORMS[:4], *GIVEN, "MODEL.KEYPOINT_ON", False, "MODEL.BNEXT.DOMAINS.NAMES", ("day", "night")]
    for place in places:
        pairs += [item for key in ("AFFINE", "POPULATION") for item in (f"MODEL.BNEXT.{place}.{key}", "per_domain")]
        pairs += [item for key, value in answers.items() for item in (f"MODEL.BNEXT.{place}.{key}", value)]
    model = make_model(*pairs, architecture=RCNN)
    for place in places:  # what a norm gives for a RoI tells its domain
        for norm in norms_of(model, place).values():
            for sign, name in ((1, "day"), (-1, "night")):
                torch.nn.init.zeros_(norm.get_parameter(f"{name}.weight"))
                torch.nn.init.constant_(norm.get_parameter(f"{name}.bias"), sign)
    return model


@contextlib.contextmanager
def recording_domains(model, place):
    norm, found = next(iter(norms_of(model, place).values())), []
    handle = norm.register_forward_hook(lambda norm, args, output: found.append(output.mean((1, 2, 3)).tolist()))
    yield found
    handle.remove()


@pytest.mark.parametrize("place", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
@pytest.mark.parametrize("inference", ["population", "mini_batch"])
def test_a_roi_has_the_domain_of_its_image(place, inference):
    model = make_domains(place, INFERENCE=inference)
    batch = give_proposals(make_batch((64, 64, 64)), (3, 0, 2))
    with use_domain(["day", "day", "night"]), recording_domains(model, place) as found:
        results = infer(model, batch)
    numbers = (3, 0, 2) if place == "ROI_BOX_HEAD" else [len(result) for result in results]
    assert found == [[1.0] * (numbers[0] + numbers[1]) + [-1.0] * numbers[2]]
    with use_domain("night"), recording_domains(model, place) as found:
        infer(model, batch)
    assert set(found[0]) == {-1.0}


@pytest.mark.parametrize("place", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
@pytest.mark.parametrize("form", ["none", "statistics"])
def test_domains_of_sampled_rois(place, form):
    groups = {"SHUFFLE_GROUPS": 2} if form == "statistics" else {}
    model = make_domains(place, STATISTICS="per_domain", SHUFFLE=form, **groups)
    batch = give_proposals(make_batch(), (6, 4))
    with use_domain(["night", "day"]), recording_domains(model, place) as found:
        run_step(model, batch)
    assert found[0] == sorted(found[0])
    assert {-1.0, 1.0} == set(found[0])


@pytest.mark.parametrize("place", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_domains_without_any_roi(place):
    model = make_domains(place)
    batch = give_proposals(make_batch(), (0, 0))
    for record in batch:
        record["instances"] = record["instances"][:0]
    with use_domain(["night", "day"]), recording_domains(model, place) as found:
        run_step(model, batch)
        infer(model, batch)
    assert found == [[], []]


def test_a_wrong_number_of_domains():
    model = make_domains("ROI_MASK_HEAD")
    batch = give_proposals(make_batch(), (3, 2))
    with (
        use_domain(["night", "day", "day"]),
        pytest.raises(DomainError, match="use_domain .* got 3 names for 2 images"),
    ):
        run_step(model, batch)
    with use_domain(["night", "day"]):
        run_step(model, batch)


def test_mini_batches_at_inference_of_a_head_with_another_batch_norm_are_refused():
    @ROI_BOX_HEAD_REGISTRY.register()
    class HeadWithBatchNorm1d(FastRCNNConvFCHead):
        @configurable
        def __init__(self, input_shape, **kwargs):
            super().__init__(input_shape, **kwargs)
            self.bn1 = nn.BatchNorm1d(self.output_shape.channels)

    try:
        with pytest.raises(ConfigError, match=r"INFERENCE must be 'population' .*box_head\.bn1 is a BatchNorm1d"):
            make_model(*MINI_BATCH, "MODEL.ROI_BOX_HEAD.NAME", "HeadWithBatchNorm1d", architecture=RCNN)
    finally:
        del ROI_BOX_HEAD_REGISTRY._obj_map["HeadWithBatchNorm1d"]

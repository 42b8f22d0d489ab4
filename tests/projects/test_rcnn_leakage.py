"""Box heads on a frozen trunk: their loss is detectron2's, their mini-batches are those of the arms."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from rcnn_features import cache_images
from rcnn_heads import ARMS, build_detector, compute_losses, estimate_populations, measure_ap, set_arm, train_head
from rcnn_share import share_between_groups
from rcnn_study import RcnnSetting, name_sets

from bnext.data.batches import build_validation_batches
from bnext.errors import ConfigError
from bnext.layers.walk import find_bnext_norms
from bnext.seeding import seeded
from tests import tiny

BOXES = ("MODEL.MASK_ON", "False", "SOLVER.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8")
BOXES += ("SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "1")


def load(tmp_path, arm="all"):
    return set_arm(tiny.load(tmp_path, *BOXES, config=tiny.RCNN), arm)


@pytest.fixture(scope="module")
def cached(digits, tmp_path_factory):
    """The trunk's images of the tiny set."""
    cfg = load(tmp_path_factory.mktemp("trunk"))
    return cache_images(cfg, build_detector(cfg, 1).eval(), cfg.DATASETS.TRAIN[0], limit=6)


def test_the_losses_are_those_of_the_whole_detector(cached, digits, tmp_path):
    cfg = load(tmp_path, "gn")
    model = build_detector(cfg, 1)
    cfg.SOLVER.IMS_PER_BATCH = 8
    batch = next(iter(build_validation_batches(cfg, cfg.DATASETS.TRAIN[0])))[:2]
    with torch.no_grad(), EventStorage():
        images = model.eval().preprocess_image(batch)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        model.train()
        with seeded(3):
            _, whole = model.roi_heads(images, features, proposals, [record["instances"] for record in batch])
        with seeded(3):
            ours = compute_losses(model, cached[:2])
    assert cached[0].image_id == batch[0]["image_id"]
    assert ours.keys() == whole.keys()
    for name, loss in ours.items():
        torch.testing.assert_close(loss, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ["one_image", "all"])
def test_mini_batches_are_those_of_the_arm(cached, tmp_path, arm):
    model = build_detector(load(tmp_path, arm), 1).train()
    norm, seen = next(iter(find_bnext_norms(model.roi_heads).values())), []
    norm.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    with EventStorage(), seeded(1):
        compute_losses(model, cached[:2])

    (x, y), scale = seen[0], (norm.weight.detach()[:, None, None], norm.bias.detach()[:, None, None])
    parts = x.double().split(8) if arm == "one_image" else [x.double()]
    slow = []
    for part in parts:
        var, mean = torch.var_mean(part, (0, 2, 3), correction=0, keepdim=True)
        slow.append((part - mean) / (var + norm.eps).sqrt() * scale[0] + scale[1])
    torch.testing.assert_close(y, torch.cat(slow).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_a_head_is_trained_estimated_and_measured(cached, tmp_path, arm):
    cfg = load(tmp_path, arm)
    model = build_detector(cfg, 1)
    trunk = copy.deepcopy(model.backbone.state_dict())
    assert len(train_head(cfg, model, cached, 1)) == 3
    estimate_populations(cfg, model, cached, 1)
    assert 0 <= measure_ap(cfg, model, cached[:2], cfg.DATASETS.TRAIN[0], "population") <= 100
    assert all(torch.equal(value, trunk[key]) for key, value in model.backbone.state_dict().items())


def test_the_share_between_groups_is_that_of_the_definition():
    numbers = torch.tensor([0, 0, 1, 1, 1, 2])
    features = torch.randn(6, 3, 4, 4, dtype=torch.double) + numbers[:, None, None, None]
    means = torch.stack([features[numbers == each].mean((0, 2, 3)) for each in range(3)])[numbers]
    slow = (means - features.mean((0, 2, 3))).square().mean(0) / features.var((0, 2, 3), correction=0)
    torch.testing.assert_close(share_between_groups(features, numbers, 3), slow)


@pytest.mark.parametrize("wrong", [{"arms": ["bn"]}, {"styles": [0.0]}, {"images": 1}])
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RcnnSetting(**wrong)


def test_sets_differ_by_their_style_alone():
    first, second = name_sets(RcnnSetting(styles=[0.0, 1.0], classes=[10, 10])).values()
    assert (first.image_style, second.image_style, first.seed) == (0, 1, second.seed)

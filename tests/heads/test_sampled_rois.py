"""RoIs as SGD samples them, for the statistics of an R-CNN's norms."""

import random

import numpy as np
import pytest
import torch

from bnext.heads import forward_sampled_rois
from bnext.statistics import recompute_population_statistics
from tests.heads.detectors import C4, CASCADE, make_batch, make_model, norms_of, run_step

RCNN = "BNextGeneralizedRCNN"
NORMS = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "BN")
BOX, MASK = "roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn1.norm"


def count_rois(run, model, *paths):
    """How many RoIs the norms see in a run."""
    found = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda norm, args: found.append(len(args[0])))
        for path in paths
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ["BNextPanopticFPN", RCNN])
def test_the_rois_are_those_of_a_training_step(architecture):
    """In number and in value: the moments of a norm's input are those that a training step sees."""
    model, batch = make_model(*NORMS, architecture=architecture), make_batch()
    inputs = []
    handle = model.get_submodule(BOX).register_forward_pre_hook(lambda norm, args: inputs.append(args[0].detach()))
    trained = count_rois(lambda: run_step(model, batch), model, BOX, MASK)
    torch.manual_seed(0)
    model.eval()
    sampled = count_rois(lambda: forward_sampled_rois(model, batch), model, BOX, MASK)
    top_scored = count_rois(lambda: model(batch), model, BOX, MASK)
    handle.remove()
    assert sampled == trained
    torch.testing.assert_close(inputs[0], inputs[1])
    assert top_scored[1] == 8 != sampled[1]


@pytest.mark.parametrize("pairs", [NORMS, (*NORMS, *CASCADE), (*C4, "MODEL.RESNETS.NORM", "BN")])
def test_nothing_but_the_statistics_changes(pairs):
    model = make_model(*pairs, architecture=RCNN)
    run_step(model, make_batch())
    model.roi_heads.train()
    model.roi_heads.box_predictor.eval()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = recompute_population_statistics(model, [make_batch(), make_batch()], forward=forward_sampled_rois)
    assert modes == [module.training for module in model.modules()]
    assert all(norm.groups is None for norm in norms_of(model).values() if hasattr(norm, "groups"))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    reached = {f"{estimate.path}.{key}" for estimate in report.estimates for key in ("running_mean", "running_var")}
    assert {name for name in moved if "num_batches" not in name} == reached
    assert not report.not_reached


@pytest.mark.parametrize("training", [True, False])
def test_an_exception_leaves_the_model_as_it_was(training):
    model = make_model(*NORMS).train(training)
    model.roi_heads.mask_head.train(not training)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    records = make_batch()
    del records[1]["instances"]  # as of a mapper for inference
    with pytest.raises(KeyError):
        recompute_population_statistics(model, [make_batch(), records], forward=forward_sampled_rois)
    with pytest.raises(KeyError):
        forward_sampled_rois(model, records)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_leaf_modules_keep_their_mode():
    model = make_model(*NORMS).eval()
    seen = {}
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda module, args, path=path: seen.update({path: module.training}))
    forward_sampled_rois(model, make_batch())
    assert len(seen) > 50
    assert not any(seen.values())


def test_images_without_an_object():
    model = make_model(*NORMS[:4], "MODEL.KEYPOINT_ON", False)
    batch = make_batch()
    for record in batch:
        record["instances"] = record["instances"][:0]
    report = recompute_population_statistics(model, [batch], forward=forward_sampled_rois)
    assert [estimate.path for estimate in report.not_reached] == [MASK]
    report = recompute_population_statistics(model, [batch, make_batch()], forward=forward_sampled_rois)
    assert not report.not_reached


def test_pictures_of_a_training_are_none_of_it():
    """VIS_PERIOD 1 would draw in every forward what nobody sees."""
    model = make_model(*NORMS, "VIS_PERIOD", 1, architecture=RCNN)
    drawn = []
    model.visualize_training = lambda *args: drawn.append(args)
    report = recompute_population_statistics(model, [make_batch()], forward=forward_sampled_rois)
    assert {estimate.path for estimate in report.estimates} >= {BOX, MASK}
    assert drawn == []
    assert (model.vis_period, model.roi_heads.mask_head.vis_period) == (1, 1)


def test_random_numbers_decide_which_rois():
    model = make_model(*NORMS, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4)

    def estimate(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        recompute_population_statistics(model, [make_batch()], forward=forward_sampled_rois)
        return model.get_submodule(BOX).running_mean.clone()

    first, other, again = estimate(0), estimate(1), estimate(0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

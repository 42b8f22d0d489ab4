"""Which forward the norms of a detector need; and what a forward that is broken off leaves in detectron2's own head."""

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from bnext import convert_norm_state, recompute_population_statistics
from bnext.errors import ConfigError
from bnext.heads import RetinaNetHead, forward_sampled_rois, forward_statistics
from bnext.heads.statistics import choose_forward
from bnext.scope.domain import get_active_domain
from bnext.statistics.observe import select_norms
from tests.heads.detectors import LEVELS, make_batch, make_detector, make_model
from tests.statistics.models import assert_as_before, snapshot

BOX = ("MODEL.ROI_BOX_HEAD.NORM", "BN")
BACKBONE = ("MODEL.RESNETS.NORM", "BN")


def paths_of(model):
    return list(select_norms(model))


def in_head(path, module):
    return path.startswith("head.")


def run_training_forward(model, batch):
    model.training = True
    with EventStorage():
        model(batch)
    model.training = False


@pytest.mark.parametrize("architecture", ["RetinaNet", "BNextRetinaNet"])
def test_a_dense_detector_runs_its_towers_alone(architecture):
    """The statistics are those of the whole forward, bit by bit; neither predictors' maps nor losses are needed."""
    model, other = (make_detector(architecture, row=1) for _ in range(2))
    assert choose_forward(model, paths_of(model)) is forward_statistics
    data = [make_batch(seed=seed) for seed in range(3)]
    unlabelled = [[{"image": record["image"]} for record in batch] for batch in data]
    recompute_population_statistics(model, unlabelled, forward=forward_statistics)
    recompute_population_statistics(other, data, forward=run_training_forward)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


class OverriddenHead(RetinaNetHead):
    """A user's, whose towers get something else."""

    def forward(self, features):
        return super().forward([2 * feature for feature in features])


@pytest.mark.parametrize("architecture", ["BNextRetinaNet", "BNextFCOS"])
def test_predictors_are_skipped_where_no_norm_can_miss_them(architecture):
    model = make_detector(architecture, row=1)
    calls = []
    for name, child in model.head.named_children():
        child.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    unlabelled = [{"image": record["image"]} for record in make_batch()]
    forward_statistics(model, unlabelled)
    assert not calls  # a tower's modules are called one by one
    if architecture == "BNextRetinaNet":
        model.head.__class__ = OverriddenHead
        forward_statistics(model, unlabelled)
        assert calls.count("cls_score") == len(LEVELS)
        model.head.__class__ = RetinaNetHead
    model.head.bbox_pred = nn.Sequential(model.head.bbox_pred, nn.BatchNorm2d(model.head.bbox_pred.out_channels))
    report = recompute_population_statistics(model, [unlabelled], forward=forward_statistics)
    assert "head.bbox_pred.1" in [estimate.path for estimate in report.reached]


def test_towers_end_with_the_last_norm_that_is_not_known():
    """What is left out keeps what it knows, all others have what whole towers give, and the head is as it was."""
    data = []
    for seed in range(32):
        contrast = torch.rand((), generator=torch.Generator().manual_seed(seed)) + 0.5
        images = [(record["image"] * contrast).clamp(max=255) for record in make_batch(seed=seed)]
        data.append([{"image": image} for image in images])

    def run(**options):
        model = make_detector(row=1)
        before = snapshot(model)
        report = recompute_population_statistics(model, data, forward=forward_statistics, layers=in_head, **options)
        assert snapshot(model)[1:] == before[1:]
        return report, model.state_dict()

    whole, _ = run()
    errors = sorted(estimate.error for estimate in whole.estimates)
    report, state = run(tolerance=1.02 * errors[-1])
    last = report.estimates[[estimate.error for estimate in whole.estimates].index(errors[-1])]
    fewer = [estimate for estimate in report.estimates if estimate.num_batches < report.num_batches]
    assert fewer
    assert last.num_batches == report.num_batches
    assert not report.not_converged

    expected, of_all = run(num_batches=report.num_batches)
    for own, other in zip(report.estimates, expected.estimates, strict=True):
        if own not in fewer:
            assert own == other
            assert torch.equal(state[f"{own.path}.running_var"], of_all[f"{own.path}.running_var"])


@pytest.mark.parametrize("rois", ["sampled", "top_scored"])
def test_an_r_cnn_without_norms_after_its_backbone_runs_the_backbone_alone(rois):
    model = make_model(*BACKBONE, architecture="BNextGeneralizedRCNN")
    paths = [path for path in paths_of(model) if path.startswith("backbone.")]
    calls = []
    model.proposal_generator.register_forward_pre_hook(lambda module, args: calls.append(module))
    forward = choose_forward(model, paths, rois)
    recompute_population_statistics(
        model, [make_batch()], forward=forward, layers=lambda path, module: path.startswith("backbone.")
    )
    assert not calls


@pytest.mark.parametrize("architecture", ["RetinaNet", "BNextRetinaNet", "BNextFCOS"])
def test_a_dense_detector_whose_norms_are_all_in_its_backbone_runs_the_backbone_alone(architecture):
    model, other = (make_detector(architecture, norm="") for _ in range(2))
    for own in (model, other):
        own.backbone.bottom_up.stem.conv1.norm = nn.BatchNorm2d(8)
    assert paths_of(model) == ["backbone.bottom_up.stem.conv1.norm"]
    calls = []
    model.head.cls_subnet[0].register_forward_pre_hook(lambda module, args: calls.append(module))
    unlabelled = [[{"image": record["image"]} for record in make_batch(seed=seed)] for seed in range(2)]
    recompute_population_statistics(model, unlabelled, forward=choose_forward(model, paths_of(model)))
    assert not calls
    recompute_population_statistics(other, unlabelled, forward=forward_statistics)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["BNextGeneralizedRCNN", "BNextPanopticFPN"])
def test_an_r_cnn_with_norms_in_its_heads_runs_them_on_the_chosen_rois(architecture):
    model = make_model(*BOX, *BACKBONE, architecture=architecture)
    assert choose_forward(model, paths_of(model)) is forward_sampled_rois
    assert choose_forward(model, paths_of(model), "top_scored") is None
    for rois in ("sampled", "top_scored"):
        forward = choose_forward(model, paths_of(model), rois)
        report = recompute_population_statistics(model, [make_batch(), make_batch(seed=1)], forward=forward)
        assert not report.not_reached


def test_any_other_model_is_called_itself():
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert choose_forward(model, paths_of(model)) is None


def test_an_unknown_choice_of_rois_is_refused():
    with pytest.raises(ConfigError, match=r"rois must be one of 'sampled', 'top_scored'; got 'all' \(choose_forward\)"):
        choose_forward(nn.Sequential(nn.BatchNorm2d(3)), ["0"], "all")


def own_levels(module):
    """The count of calls by which CycleBatchNormList knows its level."""
    return [part._pos for part in module.modules() if type(part).__name__ == "CycleBatchNormList"]


def test_layer_by_layer_of_detectron2s_own_head_is_that_of_ours():
    """Its forwards are broken off after each of its norms, and its count of levels goes on where it was."""
    theirs, ours = make_detector("RetinaNet"), make_detector("BNextRetinaNet", row=4)
    state, _ = convert_norm_state(theirs.state_dict(), ours)
    ours.load_state_dict(state)
    data = [make_batch(seed=seed) for seed in range(2)]
    arguments = {"forward": forward_statistics, "layers": in_head, "estimator": "layer_by_layer"}
    report = recompute_population_statistics(theirs, data, **arguments)
    expected = recompute_population_statistics(ours, data, **arguments)
    assert own_levels(theirs) == [0] * 4
    assert len(report.reached) == len(expected.reached) == 4 * len(LEVELS)
    converted, _ = convert_norm_state(theirs.state_dict(), ours)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(converted[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_forward_that_is_interrupted_within_detectron2s_own_head_is_as_if_it_had_not_been():
    model = make_detector("RetinaNet")
    before = snapshot(model)

    calls = []

    def interrupt_at_p5(module, args):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.head.cls_subnet[1].register_forward_pre_hook(interrupt_at_p5)
    with pytest.raises(KeyboardInterrupt):
        recompute_population_statistics(model, [make_batch()], forward=forward_statistics)
    handle.remove()
    assert own_levels(model) == [0] * 4
    assert_as_before(model, before)


def test_forwards_past_the_model_know_the_domains_of_their_records():
    model, domains = make_detector(), []
    model.backbone.register_forward_pre_hook(lambda *_: domains.append(get_active_domain()))
    batch = [{**record, "domain": name} for record, name in zip(make_batch(), ("day", "night"), strict=True)]
    forward_statistics(model, batch)
    choose_forward(model, ["backbone.fpn_lateral3.norm"])(model, batch[:1])
    forward_statistics(model, make_batch())
    assert domains == [("day", "night"), "day", None]
    assert get_active_domain() is None

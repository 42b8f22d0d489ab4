"""SHUFFLE in one process: what is attached to which head, and what is refused when a model is built."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_KEYPOINT_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import nn

from bnext.config.places import PLACES
from bnext.errors import ConfigError
from bnext.layers.deal import StatisticsDeal
from tests.heads.detectors import C4, CASCADE, make_batch, make_model, norms_of, run_step, shuffle_pairs
from tests.record import note_groups
from tests.workers import run_workers

RCNN = "BNextGeneralizedRCNN"
NORMS = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "BN")


def shuffle(place, form="statistics", groups=0):
    return (*shuffle_pairs(form, place), f"MODEL.BNEXT.{place}.SHUFFLE_GROUPS", groups)


def deals_of(model):
    found = {}
    for name in ("box_head", "mask_head", "keypoint_head"):
        hooks = model.get_submodule(f"roi_heads.{name}")._forward_pre_hooks.values()
        owners = [getattr(hook, "__self__", None) for hook in hooks]
        found[name] = [owner.num_groups for owner in owners if isinstance(owner, StatisticsDeal)]
    return found


def test_each_head_has_its_own_setting():
    settings = (*shuffle("ROI_BOX_HEAD", groups=3), *shuffle("ROI_MASK_HEAD", "features"))
    model = make_model(*NORMS, *settings)
    assert deals_of(model) == {"box_head": [3], "mask_head": [], "keypoint_head": []}
    assert [hasattr(vars(part).get("layers"), "check_used") for part in model.roi_heads.children()].count(True) == 1
    noted = note_groups(model)
    run_step(model, make_batch())
    norms = {name: norm for name, norm in norms_of(model, None).items() if name.startswith("roi_heads")}
    groups = {name: noted[norm] for name, norm in norms.items()}
    assert groups["roi_heads.box_head.conv1.norm"].num_groups == 3
    assert {path for path, own in groups.items() if own is not None} == {"roi_heads.box_head.conv1.norm"}
    workers = {path.split(".")[1]: norm.spec.workers for path, norm in norms_of(model).items() if path in groups}
    assert workers == {"box_head": "all", "mask_head": "one", "keypoint_head": "one"}


def test_each_stage_of_a_cascade_has_a_deal_of_its_own_in_every_step():
    pairs = (*CASCADE, "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 2)
    model = make_model(*pairs, *shuffle("ROI_BOX_HEAD", groups=2), architecture=RCNN)

    def step(seed):
        torch.manual_seed(seed)
        model.proposal_generator.requires_grad_(False)
        norms, noted = norms_of(model, "ROI_BOX_HEAD"), note_groups(model)
        run_step(model, make_batch(seed=seed))
        return {path: noted[norm].numbers.tolist() for path, norm in norms.items()}

    first, again = step(0), step(0)
    assert first == again
    assert len(first) == 6
    for stage in range(3):
        path = f"roi_heads.box_head.{stage}.conv%d.norm"
        assert first[path % 1] == first[path % 2], "one deal for the norms of a head"
        assert abs(first[path % 1].count(0) - first[path % 1].count(1)) <= 1
    assert len({tuple(numbers) for numbers in first.values()}) == 3


def test_dealt_groups_change_the_training_alone():
    """Losses differ from those of whole mini-batches; results of an evaluation are the same."""
    plain = make_model(*NORMS)
    dealt = make_model(*NORMS, *shuffle("ROI_BOX_HEAD", groups=4))
    expected, losses = (run_step(model, make_batch())[0] for model in (plain, dealt))
    assert losses["loss_rpn_cls"] == expected["loss_rpn_cls"]
    assert losses["loss_cls"] != expected["loss_cls"]
    dealt.load_state_dict(plain.state_dict())
    first, second = (infer(model) for model in (plain, dealt))
    assert all(torch.equal(own.scores, other.scores) for own, other in zip(first, second, strict=True))


def infer(model):
    with torch.no_grad():
        return [result["instances"] for result in model.eval()(make_batch())]


def test_batches_without_a_roi():
    norms = ("MODEL.KEYPOINT_ON", False, *NORMS[:4])  # whose metrics warn without a RoI
    model = make_model(*norms, *shuffle("ROI_BOX_HEAD", groups=2), *shuffle("ROI_MASK_HEAD", groups=2))
    batch = make_batch()
    for record in batch:
        record["instances"] = record["instances"][:0]
    losses, _ = run_step(model, batch)
    assert losses["loss_mask"] == 0


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_one_worker_without_a_number_of_groups_runs_and_says_so_once(form, caplog):
    model = make_model(*NORMS, *shuffle("ROI_BOX_HEAD", form))
    for _ in range(2):
        run_step(model, make_batch())
    told = [record.getMessage() for record in caplog.records if record.name.startswith("bnext.")]
    told = [text for text in told if "are not dealt" in text or "has no use" in text]
    assert len(told) == 1
    if form == "statistics":
        assert "(roi_heads.box_head.conv1.norm)" in told[0]
        assert "set MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE_GROUPS to 2 or more" in told[0]
    else:
        assert "MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE features has no use" in told[0]
        assert "1 worker(s) are dealt to 1 group(s). Use more workers" in told[0]


def test_groups_of_rois_of_a_single_image_are_told(caplog):
    model = make_model(*NORMS, *shuffle("ROI_BOX_HEAD", groups=4), "SOLVER.IMS_PER_BATCH", 1)
    with torch.no_grad():
        model.eval()(make_batch((64,)))
    assert "has no use" not in caplog.text  # nor is anything dealt
    for _ in range(2):
        run_step(model, make_batch((64,)))
    assert caplog.text.count("has no use: RoIs of 1 image(s) on 1 worker(s) are dealt to 4 group(s)") == 1


def test_more_groups_than_there_can_be_rois_train_and_are_told(caplog):
    model = make_model(*NORMS, *shuffle("ROI_BOX_HEAD", groups=4000), *shuffle("ROI_MASK_HEAD", groups=50))
    losses, gradients = run_step(model, make_batch())
    assert all(torch.isfinite(value).all() for value in (*losses.values(), *gradients.values()))
    assert "SHUFFLE_GROUPS leaves most groups with a RoI or none" in caplog.text


def test_copies_and_pickles_train_alike():
    settings = (*shuffle("ROI_BOX_HEAD", groups=3), *shuffle("ROI_MASK_HEAD", "features"))
    model = make_model(*NORMS, *settings, *shuffle("ROI_KEYPOINT_HEAD", groups=2))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = run_step(model, make_batch())
    for same in copies:
        losses, gradients = run_step(same, make_batch())
        assert losses == expected[0]
        assert all(torch.equal(value, gradients[name]) for name, value in expected[1].items())


@pytest.mark.parametrize(("form", "norm"), [("statistics", "BN"), ("features", "BN"), ("features", "")])
def test_a_box_head_that_a_c4_model_has_not(form, norm):
    """Its RoIs go through the last stage of the backbone; the key had been without effect."""
    with pytest.raises(ConfigError, match=r"ROI_BOX_HEAD\.(NORM|SHUFFLE) must .*StandardROIHeads"):
        make_model(*C4, "MODEL.ROI_BOX_HEAD.NORM", norm, *shuffle("ROI_BOX_HEAD", form), architecture=RCNN)


@pytest.mark.parametrize(
    ("place", "norm"), [("ROI_BOX_HEAD", "FrozenBN"), ("ROI_MASK_HEAD", ""), ("ROI_KEYPOINT_HEAD", "GN")]
)
def test_features_of_a_head_without_batch_norm(place, norm):
    with pytest.raises(ConfigError, match=rf"MODEL\.BNEXT\.{place}\.SHUFFLE must be 'none' .*Set {PLACES[place].norm}"):
        make_model(PLACES[place].norm, norm, *shuffle(place, "features"))


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_a_head_without_convolutions(form):
    with pytest.raises(ConfigError, match=r"NUM_CONV to 1 or more"):
        make_model("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 0, *shuffle("ROI_BOX_HEAD", form))


@ROI_BOX_HEAD_REGISTRY.register()
class TwoOutputs(nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.norm = nn.BatchNorm2d(input_shape.channels)
        self.output_shape = type(input_shape)(channels=input_shape.channels)

    def forward(self, x):
        return self.norm(x), x


@ROI_MASK_HEAD_REGISTRY.register()
class OwnForward(BaseMaskRCNNHead):
    """Does not call `layers`."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = Conv2d(input_shape.channels, 3, 1, norm=get_norm("BN", 3))

    def forward(self, x, instances):
        return {"loss_mask": self.conv(x).sum()}


@ROI_MASK_HEAD_REGISTRY.register()
class OwnLoss(OwnForward):
    """Calls `layers`, which is enough."""

    def layers(self, x):
        return self.conv(x)

    def forward(self, x, instances):
        return {"loss_mask": self.layers(x).square().sum()}


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class NoBase(nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = Conv2d(input_shape.channels, 3, 1, norm=get_norm("BN", 3))

    def forward(self, x, instances):
        return {"loss_keypoint": self.conv(x).sum()}


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class OwnKeypoints(BaseKeypointRCNNHead):
    def __init__(self, cfg, input_shape):
        super().__init__(num_keypoints=2)
        self.conv = nn.Sequential(nn.Conv2d(input_shape.channels, 2, 1), nn.BatchNorm2d(2))

    def layers(self, x):
        return self.conv(x)


def step_of_a_worker(rank, pairs):
    losses, _ = run_step(make_model(*pairs, architecture=RCNN), make_batch(seed=rank))
    return {name: float(loss) for name, loss in losses.items()}


def test_a_users_head_whose_features_cannot_be_moved():
    pairs = ("MODEL.ROI_KEYPOINT_HEAD.NAME", "NoBase", *shuffle("ROI_KEYPOINT_HEAD", "features"))
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.ROI_KEYPOINT_HEAD\.SHUFFLE must .*NoBase"):
        make_model(*pairs)
    pairs = ("MODEL.ROI_BOX_HEAD.NAME", "TwoOutputs", *shuffle("ROI_BOX_HEAD", "features"))
    with pytest.raises(AssertionError, match="must return a tensor with one row per sample; got tuple"):
        run_workers(step_of_a_worker, 2, pairs)


def test_a_users_head_that_does_not_call_its_layers():
    """Its RoIs would stay at home without a word."""
    own = ("MODEL.ROI_MASK_HEAD.NAME", "OwnForward", *shuffle("ROI_MASK_HEAD", "features"))
    with pytest.raises(ConfigError, match=r"`layers`; .*roi_heads\.mask_head, OwnForward"):
        run_step(make_model(*own), make_batch())
    run_step(make_model("MODEL.ROI_MASK_HEAD.NAME", "OwnLoss", *shuffle("ROI_MASK_HEAD", "features")), make_batch())


def test_a_users_keypoint_head_moves_its_features():
    name = ("MODEL.ROI_KEYPOINT_HEAD.NAME", "OwnKeypoints", "MODEL.ROI_BOX_HEAD.NORM", "")
    pairs = {form: (*name, *shuffle("ROI_KEYPOINT_HEAD", form)) for form in ("features", "none")}
    moved, still = (run_workers(step_of_a_worker, 2, own) for own in pairs.values())
    for losses, others in zip(moved, still, strict=True):
        assert losses["loss_cls"] == others["loss_cls"]
        assert losses["loss_keypoint"] != others["loss_keypoint"]

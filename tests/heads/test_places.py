"""Every place of a detector with every norm, by keys; and detectron2's own model by the defaults."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from bnext import use_domain
from bnext.config import PLACES
from bnext.errors import ConfigError, DomainError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from bnext.layers.build import NORM_NAMES, LayerNorm2d
from bnext.layers.forms import iterate_norms
from tests.heads.detectors import make_batch, make_cfg, make_detector, make_model, run_step

LEVELS = ("p2", "p3", "p4", "p5", "p6")
ROOTS = {
    "RESNETS": "backbone.bottom_up.",
    "FPN": "backbone.fpn_",
    "RPN": "proposal_generator.",
    "ROI_BOX_HEAD": "roi_heads.box_head.",
    "ROI_MASK_HEAD": "roi_heads.mask_head.",
    "ROI_KEYPOINT_HEAD": "roi_heads.keypoint_head.",
    "SEM_SEG_HEAD": "sem_seg_head.",
}
CLASSES = {"FrozenBN": FrozenBatchNorm2d, "GN": nn.GroupNorm, "LN": LayerNorm2d, "": type(None)}
DETECTRON2S = [place for place in ROOTS if not PLACES[place].norm.startswith("MODEL.BNEXT.")]
EVERYWHERE = [pair for place in DETECTRON2S for pair in (PLACES[place].norm, "BN")]
C4 = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.KEYPOINT_ON", False, "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]]),
    *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ROI_MASK_HEAD.NUM_CONV", 0),
]


def norms_of(model, place=None):
    root = ROOTS[place] if place else ""
    return {path: norm for path, norm, _ in iterate_norms(model) if path.startswith(root)}


def train_and_infer(model):
    losses, gradients = run_step(model, make_batch((64, 96)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad():
        results = model(make_batch((64, 96)))
    assert len(results) == 2
    return losses, gradients, results


@pytest.mark.parametrize("name", NORM_NAMES)
@pytest.mark.parametrize("place", ROOTS)
def test_every_norm_at_every_place(place, name):
    model = make_model(PLACES[place].norm, name)
    expected = CLASSES.get(name, LevelBatchNorm2d if place == "RPN" else BatchNorm2d)
    norms = norms_of(model, place)
    assert {type(norm) for norm in norms.values()} == ({expected} if name else set())
    if name in ("BN", "SyncBN"):
        assert {norm.spec.workers for norm in norms.values()} == {"all" if name == "SyncBN" else "one"}
        assert all(norm.path == path for path, norm in norms.items())
    for other in set(ROOTS) - {place}:
        assert {type(norm) for norm in norms_of(model, other).values()} <= {FrozenBatchNorm2d}
    train_and_infer(model)
    moved = [norm for norm in norms.values() if name in ("BN", "SyncBN")]
    assert all(state.num_batches_tracked == 1 for norm in moved for _, state in norm.populations())


@pytest.mark.parametrize("architecture", ["PanopticFPN", "GeneralizedRCNN"])
def test_batch_norms_everywhere_are_detectron2s_bit_by_bit(architecture):
    """From the same seed: keys, start, losses, gradients, buffers after a step, and detections."""
    pairs = [*EVERYWHERE, "MODEL.BACKBONE.FREEZE_AT", 2]
    stock, ours = (make_model(*pairs, architecture=name) for name in (architecture, f"BNext{architecture}"))
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert {type(norm) for norm in norms_of(ours).values()} == {BatchNorm2d, FrozenBatchNorm2d}
    assert [name for name, _ in stock.named_parameters()] == [name for name, _ in ours.named_parameters()]
    expected, found = train_and_infer(stock), train_and_infer(ours)
    for index in range(2):
        assert all(torch.equal(value, expected[index][name]) for name, value in found[index].items())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in stock.state_dict().items())
    for result, right in zip(found[2], expected[2], strict=True):
        assert torch.equal(result["instances"].scores, right["instances"].scores)
        assert torch.equal(result["instances"].pred_boxes.tensor, right["instances"].pred_boxes.tensor)


@pytest.mark.parametrize(
    ("architecture", "places"),
    [
        ("GeneralizedRCNN", ROOTS),
        ("ProposalNetwork", ("RESNETS", "FPN")),
        ("SemanticSegmentor", ("RESNETS", "FPN", "SEM_SEG_HEAD")),
    ],
)
@pytest.mark.parametrize("name", ["BN", "SyncBN"])
def test_checkpoints_load_both_ways(architecture, places, name):
    places = [place for place in DETECTRON2S if place in places]
    pairs = [pair for place in places for pair in (PLACES[place].norm, name)]
    stock, ours = (make_model(*pairs, architecture=prefix + architecture) for prefix in ("", "BNext"))
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert sum(isinstance(norm, BatchNorm2d) for norm in norms_of(ours).values()) == len(norms_of(stock))
    train_and_infer(ours)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_retinanet_without_a_norm_in_its_head_is_detectron2s(norm):
    models = []
    for architecture in ("RetinaNet", "BNextRetinaNet"):
        cfg = make_cfg(
            *("MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", "BN", "MODEL.RPN.IN_FEATURES", ["p3"]),
            *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
            architecture=architecture,
        )
        models.append(build_model(cfg))
    stock, ours = models
    ours.load_state_dict(stock.state_dict(), strict=True)
    expected, found = (run_step(model, make_batch((64, 96))) for model in models)
    assert all(torch.equal(value, expected[0][key]) for key, value in found[0].items())
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in ours.state_dict().items())
    for key, value in found[1].items():  # summed over levels in another order
        torch.testing.assert_close(value, expected[1][key], rtol=0, atol=1e-5 * float(value.abs().max()) + 1e-9)


@pytest.mark.parametrize("name", ["BN", "SyncBN", "GN", "LN"])
@pytest.mark.parametrize("keys", [(), ("MODEL.BNEXT.RESNETS.EPS", 0.01)])
def test_frozen_stages_stay_frozen(name, keys):
    """Asked as "I asked for SyncBN, why is res2 frozen?" in facebookresearch/detectron2#2022: it is, and stays so."""
    if keys and name in ("GN", "LN"):
        pytest.skip("refused: the key would have no effect")
    model = make_model("MODEL.RESNETS.NORM", name, "MODEL.BACKBONE.FREEZE_AT", 2, *keys)
    norms = norms_of(model, "RESNETS")
    frozen = {path for path in norms if path.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2"))}
    assert 0 < len(frozen) < len(norms)
    assert not any(p.requires_grad for path in frozen for p in norms[path].parameters())
    assert all(p.requires_grad for path in norms.keys() - frozen for p in norms[path].parameters())
    expected = FrozenBatchNorm2d if "BN" in name else CLASSES[name]
    assert {type(norms[path]) for path in frozen} == {expected}
    assert not any(isinstance(norms[path], FrozenBatchNorm2d) for path in norms.keys() - frozen)
    train_and_infer(model)


def test_the_answers_of_a_node_reach_the_norms_of_its_place_alone():
    pairs = [pair for place in ROOTS for pair in (PLACES[place].norm, "BN")]
    for index, place in enumerate(ROOTS):
        node = f"MODEL.BNEXT.{place}"
        pairs += [f"{node}.MOMENTUM", 0.2 + index / 100, f"{node}.NORMALIZATION_BATCH_SIZE", index + 1]
        pairs += [f"{node}.EPS", 0.001, f"{node}.FROZEN", "affine", f"{node}.INFERENCE", "mini_batch"]
        pairs += [f"{node}.SINGLE_ELEMENT", "population"]
    model = make_model(*pairs)
    for index, place in enumerate(ROOTS):
        specs = {norm.spec for norm in norms_of(model, place).values()}
        assert len(specs) == 1
        spec = specs.pop()
        assert (spec.momentum, spec.normalization_batch_size, spec.eps) == (0.2 + index / 100, index + 1, 0.001)
        assert (spec.frozen, spec.inference, spec.single_element) == ("affine", "mini_batch", "population")
    assert not any(p.requires_grad for norm in norms_of(model).values() for p in norm.parameters())
    train_and_infer(model)


def test_workers_of_a_node_win_over_the_name():
    model = make_model("MODEL.FPN.NORM", "SyncBN", "MODEL.BNEXT.FPN.WORKERS", 1)
    assert {norm.spec.workers for norm in norms_of(model, "FPN").values()} == {1}


def test_every_stage_of_a_cascade():
    pairs = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    model = make_model(*pairs, "MODEL.ROI_BOX_HEAD.NORM", "SyncBN", architecture="BNextGeneralizedRCNN")
    norms = norms_of(model, "ROI_BOX_HEAD")
    assert list(norms) == [f"roi_heads.box_head.{stage}.conv1.norm" for stage in range(3)]
    assert {type(norm) for norm in norms.values()} == {BatchNorm2d}
    train_and_infer(model)


def test_heads_of_c4_models_follow_the_backbones_keys():
    model = make_model(
        *C4, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.BNEXT.RESNETS.EPS", 0.01, architecture="BNextGeneralizedRCNN"
    )
    norms = norms_of(model)
    assert {path.split(".")[0] for path in norms} == {"backbone", "roi_heads"}
    assert {(type(norm), norm.eps, norm.spec.workers) for norm in norms.values()} == {(BatchNorm2d, 0.01, "all")}
    train_and_infer(model)


def test_a_model_copies_and_pickles():
    model = make_model(*EVERYWHERE, "MODEL.BNEXT.RPN.NORM", "BN", "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "LN")
    expected = run_step(model, make_batch())[0]
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert run_step(same, make_batch())[0] == expected


NO_CONV = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 0)
DOMAINS = ("MODEL.BNEXT.DOMAINS.NAMES", ("day", "night"))


def test_a_backbone_with_statistics_per_domain():
    keys = [item for key in ("STATISTICS", "POPULATION") for item in (f"MODEL.BNEXT.RESNETS.{key}", "per_domain")]
    model = make_model("MODEL.RESNETS.NORM", "BN", *keys, *DOMAINS)
    with use_domain(["night", "day"]):
        losses, _ = run_step(model, make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    norms = norms_of(model, "RESNETS").values()
    assert {norm.domains for norm in norms} == {("day", "night")}
    assert all(norm.population_state(name).num_batches_tracked == 1 for norm in norms for name in norm.domains)
    with pytest.raises(DomainError, match=r"No domain is active in backbone\.bottom_up\.stem\.conv1\.norm"):
        run_step(model, make_batch())
    fallback = make_model("MODEL.RESNETS.NORM", "BN", *keys, *DOMAINS, "MODEL.BNEXT.DOMAINS.FALLBACK", "day")
    run_step(fallback, make_batch())
    assert all(norm.population_state("day").num_batches_tracked == 1 for norm in norms_of(fallback, "RESNETS").values())


def test_roi_heads_take_one_domain_and_refuse_one_per_image():
    """With two images and two RoIs the numbers would agree, and the RoIs would be taken for images."""
    keys = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_BOX_HEAD.POPULATION", "per_domain", *DOMAINS)
    model = make_model(*keys)
    with use_domain("night"):
        run_step(model, make_batch())
    norm = norms_of(model, "ROI_BOX_HEAD")["roi_heads.box_head.conv1.norm"]
    assert [int(norm.population_state(name).num_batches_tracked) for name in norm.domains] == [0, 1]
    with use_domain(["night", "day"]), pytest.raises(DomainError, match="one domain for all images"):
        run_step(model, make_batch())


@pytest.mark.parametrize(
    ("pairs", "key", "remedy"),
    [
        (("MODEL.ROI_BOX_HEAD.NORM", "BN", *NO_CONV), "MODEL.ROI_BOX_HEAD.NORM", "NUM_CONV to 1"),
        (("MODEL.ROI_BOX_HEAD.NORM", "GN", *NO_CONV), "MODEL.ROI_BOX_HEAD.NORM", "NUM_CONV to 1"),
        (("MODEL.ROI_MASK_HEAD.NORM", "LN", "MODEL.ROI_MASK_HEAD.NUM_CONV", 0), "MODEL.ROI_MASK_HEAD.NORM", "NUM_CONV"),
        ((*C4, "MODEL.FPN.NORM", "SyncBN"), "MODEL.FPN.NORM", "Take a backbone with an FPN"),
        ((*C4, "MODEL.ROI_BOX_HEAD.NORM", "SyncBN"), "MODEL.ROI_BOX_HEAD.NORM", "FastRCNNConvFCHead"),
        (
            ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 5, "MODEL.BNEXT.RESNETS.MOMENTUM", 0.5),
            "MODEL.BNEXT.RESNETS.MOMENTUM",
            "Lower MODEL.BACKBONE.FREEZE_AT",
        ),
        (
            ("MODEL.BNEXT.RPN.NORM", "BN", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
            "MODEL.BNEXT.RPN.NORM",
            "MODEL.RPN.HEAD_NAME to StandardRPNHead",
        ),
    ],
)
def test_a_norm_that_the_built_model_has_not(pairs, key, remedy):
    with pytest.raises(ConfigError) as error:
        make_model(*pairs, architecture="BNextGeneralizedRCNN")
    assert str(error.value).startswith(f"{key} must keep its default in a model that has there no ")
    assert remedy in str(error.value)


class OwnBackbone(Backbone):
    """One that is built with batch norms, whatever MODEL.RESNETS.NORM says, and comes with statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=16)
        self.norms = nn.Sequential(nn.BatchNorm2d(4, eps=0.5, momentum=None), nn.SyncBatchNorm(4, affine=False))
        self.norms[0].running_mean.fill_(3.0)
        self._out_features, self._out_feature_strides = ["res4"], {"res4": 16}
        self._out_feature_channels = {"res4": 4}

    def forward(self, x):
        return {"res4": self.norms(self.conv(x))}


@pytest.fixture(autouse=True, scope="module")
def _own_backbone():
    BACKBONE_REGISTRY._do_register("OwnBackbone", lambda cfg, input_shape: OwnBackbone())
    yield
    del BACKBONE_REGISTRY._obj_map["OwnBackbone"]


@pytest.mark.parametrize("name", ["FrozenBN", "GN"])
@pytest.mark.parametrize("changes", [{}, {"MOMENTUM": 0.3, "AFFINE": "shared", "EPS": 0.25}])
def test_norms_of_another_backbone_keep_what_no_key_says(name, changes):
    """Its own epsilon, average, affine and state, which a conversion by defaults would lose."""
    keys = [item for key, value in changes.items() for item in (f"MODEL.BNEXT.RESNETS.{key}", value)]
    pairs = (*C4, "MODEL.BACKBONE.NAME", "OwnBackbone", "MODEL.RESNETS.NORM", name, *keys)
    model = make_model(*pairs, architecture="BNextProposalNetwork")
    first, second = norms_of(model)["backbone.norms.0"], norms_of(model)["backbone.norms.1"]
    assert type(first) is type(second) is BatchNorm2d
    assert (first.eps, first.momentum) == ((0.25, 0.3) if changes else (0.5, None))
    assert (first.spec.workers, second.spec.workers, second.weight) == ("one", "all", None)
    assert torch.equal(first.running_mean, torch.full((4,), 3.0))
    train_and_infer(model)


def test_head_of_retinanet_with_layer_norm():
    model = make_detector("BNextRetinaNet", "LN")
    assert sum(isinstance(norm, LayerNorm2d) for norm in model.head.modules()) == 4
    train_and_infer(model)

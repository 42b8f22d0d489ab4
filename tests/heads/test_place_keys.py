"""The keys of a place: they reach its norms and no others, whatever the heads and the backbone are."""

import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from bnext import use_domain
from bnext.config.places import PLACES
from bnext.errors import ConfigError, DomainError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from tests.heads.detectors import (
    C4,
    ROOTS,
    make_batch,
    make_cfg,
    make_detector,
    make_model,
    norms_of,
    run_step,
    train_and_infer,
)

EVERYWHERE = [pair for place in ROOTS for pair in (PLACES[place].norm, "BN")]


def test_the_answers_of_a_node_reach_the_norms_of_its_place_alone():
    pairs = list(EVERYWHERE)
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


def test_heads_of_c4_models_follow_the_backbones_keys():
    model = make_model(
        *C4, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.BNEXT.RESNETS.EPS", 0.01, architecture="BNextGeneralizedRCNN"
    )
    norms = norms_of(model)
    assert {path.split(".")[0] for path in norms} == {"backbone", "roi_heads"}
    assert {(type(norm), norm.eps, norm.spec.workers) for norm in norms.values()} == {(BatchNorm2d, 0.01, "all")}
    train_and_infer(model)


def test_detectron2s_predictor_sees_the_same_model(tmp_path):
    pairs = [*EVERYWHERE, "MODEL.BNEXT.FPN.EPS", 0.1]
    model = make_model(*pairs)
    run_step(model, make_batch())
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    predictor = DefaultPredictor(make_cfg(*pairs, "MODEL.WEIGHTS", str(tmp_path / "model.pth")))
    assert str(predictor.model) == str(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in predictor.model.state_dict().items())
    image = make_batch()[0]["image"].permute(1, 2, 0).numpy()
    assert "panoptic_seg" in predictor(image)


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
    rule = ("MODEL.BNEXT.DOMAINS.UNSEEN", "fallback", "MODEL.BNEXT.DOMAINS.FALLBACK", "day")
    fallback = make_model("MODEL.RESNETS.NORM", "BN", *keys, *DOMAINS, *rule)
    run_step(fallback, make_batch())
    assert all(norm.population_state("day").num_batches_tracked == 1 for norm in norms_of(fallback, "RESNETS").values())


@pytest.mark.parametrize(
    ("architecture", "place"),
    [("BNextRetinaNet", "RETINANET"), ("BNextFCOS", "RETINANET"), ("BNextProposalNetwork", "RPN")],
)
def test_a_head_with_statistics_of_each_domain_at_each_level(architecture, place):
    if architecture == "BNextFCOS":
        pytest.importorskip("detectron2.modeling.meta_arch.fcos")
    node, own = f"MODEL.BNEXT.{place}", "per_level_and_domain"
    answers = (f"{node}.STATISTICS", own, f"{node}.POPULATION", own, f"{node}.AFFINE", "per_domain")
    alone = (f"{node}.SINGLE_ELEMENT", "population")
    pairs = (PLACES[place].norm, "BN", *answers, *alone, *DOMAINS)
    if place == "RPN":
        model = make_model(*pairs, architecture=architecture)
    else:
        model = make_detector(architecture, pairs=pairs)

    batch = [{**record, "domain": name} for record, name in zip(make_batch(), ("night", "day"), strict=True)]
    losses, gradients = run_step(model, batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    norms = [norm for norm in model.modules() if isinstance(norm, LevelBatchNorm2d)]
    assert norms
    for norm in norms:
        assert len(norm.sources) == 2 * len(norm.levels) == 10
        assert [int(norm.population_state(f"{name}_p3").num_batches_tracked) for name in ("day", "night")] == [1, 1]
    with torch.no_grad():
        assert len(model.eval()(batch)) == 2


def test_rois_have_the_domain_of_their_image():
    keys = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_BOX_HEAD.POPULATION", "per_domain", *DOMAINS)
    model = make_model(*keys)
    norm = norms_of(model, "ROI_BOX_HEAD")["roi_heads.box_head.conv1.norm"]
    with use_domain("night"):
        run_step(model, make_batch())
    assert [int(norm.population_state(name).num_batches_tracked) for name in norm.domains] == [0, 1]
    with use_domain(["night", "day"]):
        run_step(model, make_batch())
    assert [int(norm.population_state(name).num_batches_tracked) for name in norm.domains] == [1, 2]
    with use_domain(["night"]), pytest.raises(DomainError, match=r"one domain per image; got 1 names for 2 images"):
        run_step(model, make_batch())


@pytest.mark.parametrize(
    ("pairs", "key", "remedy"),
    [
        (("MODEL.ROI_BOX_HEAD.NORM", "BN", *NO_CONV), "MODEL.ROI_BOX_HEAD.NORM", "NUM_CONV to 1"),
        (("MODEL.ROI_BOX_HEAD.NORM", "GN", *NO_CONV), "MODEL.ROI_BOX_HEAD.NORM", "NUM_CONV to 1"),
        (("MODEL.ROI_MASK_HEAD.NORM", "LN", "MODEL.ROI_MASK_HEAD.NUM_CONV", 0), "MODEL.ROI_MASK_HEAD.NORM", "NUM_CONV"),
        ((*C4, "MODEL.FPN.NORM", "SyncBN"), "MODEL.FPN.NORM", "Take a backbone with an FPN"),
        ((*C4, "MODEL.ROI_BOX_HEAD.NORM", "SyncBN"), "MODEL.ROI_BOX_HEAD.NORM", "NAME to StandardROIHeads"),
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


@pytest.mark.parametrize("architecture", ["BNextRetinaNet", "BNextFCOS"])
def test_levels_of_a_group_share_their_statistics(architecture):
    pairs = ("MODEL.BNEXT.RETINANET.LEVEL_GROUPS", [["p3", "p4"], ["p5", "p6", "p7"]])
    model = make_detector(architecture, pairs=pairs)
    run_step(model, make_batch())
    owners = {key.split(".")[-2] for key in model.head.state_dict() if key.endswith("running_mean")}
    assert owners == {"p3-p4", "p5-p6-p7"}
    assert all(int(count) == 1 for key, count in model.head.state_dict().items() if key.endswith("tracked"))

    copy = make_detector(architecture, seed=1, pairs=pairs)
    copy.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="'p8'"):
        make_detector(architecture, pairs=("MODEL.BNEXT.RETINANET.LEVEL_GROUPS", [["p3", "p8"]]))


def test_the_rpns_levels_go_together_too():
    pairs = ["MODEL.BNEXT.RPN.NORM", "BN", "MODEL.BNEXT.RPN.LEVEL_GROUPS", [["p2", "p3"]]]
    model = make_model(*pairs)
    assert {norm.spec.level_groups for norm in norms_of(model, "RPN").values()} == {(("p2", "p3"),)}
    train_and_infer(model)

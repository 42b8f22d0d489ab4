"""Every place of a detector with every norm, by keys; and detectron2's own model by the defaults."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from bnext.config.places import PLACES
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from bnext.layers.build import NORM_NAMES, LayerNorm2d
from tests.heads.detectors import (
    ROOTS,
    make_batch,
    make_cfg,
    make_detector,
    make_model,
    norms_of,
    run_step,
    train_and_infer,
)

LEVELS = ("p2", "p3", "p4", "p5", "p6")
CLASSES = {"FrozenBN": FrozenBatchNorm2d, "GN": nn.GroupNorm, "LN": LayerNorm2d, "": type(None)}
DETECTRON2S = [place for place in ROOTS if not PLACES[place].norm.startswith("MODEL.BNEXT.")]
EVERYWHERE = [pair for place in DETECTRON2S for pair in (PLACES[place].norm, "BN")]


# The norms of a backbone are replaced, those of an RPN and a keypoint head added; the other places are as a backbone.
WHOLLY = ("RESNETS", "RPN", "ROI_KEYPOINT_HEAD")
PAIRS = [(place, name) for place in ROOTS for name in (NORM_NAMES if place in WHOLLY else ("SyncBN", "GN"))]


@pytest.mark.parametrize(("place", "name"), PAIRS)
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
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(dict(ours.state_dict()), dict(stock.state_dict()), rtol=1e-4, atol=1e-5)
    for key, value in found[1].items():  # summed over levels in another order
        torch.testing.assert_close(value, expected[1][key], rtol=0, atol=1e-5 * float(value.abs().max()) + 1e-9)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, ()) for name in ("BN", "SyncBN", "GN", "LN")),
        *((name, ("MODEL.BNEXT.RESNETS.EPS", 0.01)) for name in ("BN", "SyncBN")),
    ],
)
def test_frozen_stages_stay_frozen(name, keys):
    """Asked as "I asked for SyncBN, why is res2 frozen?" in facebookresearch/detectron2#2022: it is, and stays so."""
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


def test_head_of_retinanet_with_layer_norm():
    model = make_detector("BNextRetinaNet", "LN")
    assert sum(isinstance(norm, LayerNorm2d) for norm in model.head.modules()) == 4
    train_and_infer(model)


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_norms_that_freeze_at_leaves_without_domains_are_told(freeze_at, caplog):
    answers = [
        pair for key in ("STATISTICS", "POPULATION", "AFFINE") for pair in (f"MODEL.BNEXT.RESNETS.{key}", "per_domain")
    ]
    domains = ["MODEL.BNEXT.DOMAINS.NAMES", ("day", "night"), "MODEL.BACKBONE.FREEZE_AT", freeze_at]
    model = make_model("MODEL.RESNETS.NORM", "BN", *answers, *domains)
    num_frozen = sum(isinstance(norm, FrozenBatchNorm2d) for norm in norms_of(model, "RESNETS").values())
    assert (num_frozen > 0) == (freeze_at > 0)
    told = [record.getMessage() for record in caplog.records if "FREEZE_AT" in record.getMessage()]
    assert len(told) == (freeze_at > 0)
    assert all(f"{num_frozen} of " in text and "RESNETS" in text for text in told)

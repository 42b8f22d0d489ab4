"""Images of an unseen domain in whole detectors: RoI heads know the image, and what it was taken for."""

import pytest
import torch
from detectron2.engine import DefaultPredictor

from bnext import use_domain
from bnext.errors import DomainError
from bnext.layers.counts import take_unseen_counts
from bnext.layers.unseen import applying_rule
from tests.heads.detectors import make_batch, make_cfg, make_model, norms_of, run_step
from tests.heads.test_roi import assert_same, infer

PLACES = ("RESNETS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
NORMS = ("MODEL.RESNETS.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN")
PAIRS = (*NORMS, "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "BN", "MODEL.BNEXT.DOMAINS.NAMES", ("day", "night"))
PAIRS += tuple(
    item
    for place in PLACES
    for key in ("POPULATION", "AFFINE")
    for item in (f"MODEL.BNEXT.{place}.{key}", "per_domain")
)
RULE = "MODEL.BNEXT.DOMAINS.UNSEEN"


def make_detector(rule):
    """Its domains have statistics of images of their own, and an affine that differs a little."""
    model = make_model(*PAIRS, RULE, rule)
    norms = [norm for norm in norms_of(model).values() if getattr(norm, "domains", ())]
    for norm in norms:
        norm.momentum = 1.0
    for name, contrast in (("day", 1.0), ("night", 0.3)):
        with use_domain(name):
            run_step(model, [{**record, "image": record["image"] * contrast} for record in make_batch()])

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (parameter for norm in norms for parameter in norm.parameters()):
            parameter += torch.rand(parameter.shape, generator=generator) * 0.1
    return model.eval()


slowly = pytest.mark.slow


@pytest.mark.parametrize(
    "rule", ["nearest", *(pytest.param(rule, marks=slowly) for rule in ("mixture", "mini_batch", "blend"))]
)
def test_the_result_of_an_image_does_not_depend_on_the_others(rule):
    """In all heads: a RoI is normalized with those of its image, by what the backbone has found for the image."""
    model, batch = make_detector(rule), make_batch((64, 64, 64))
    batch[1]["image"] = batch[1]["image"] * 0.2
    with use_domain(["fog", "night", "rain"]):
        together = infer(model, batch)
    counts = take_unseen_counts(model)
    assert {(key.domain, key.rule) for key in counts} == {("fog", rule), ("rain", rule)}
    assert set(counts.values()) == {1}, "images, not RoIs"
    for record, name, result in zip(batch, ("fog", "night", "rain"), together, strict=True):
        with use_domain(name):
            assert_same(result, infer(model, [record])[0])
    if rule == "nearest":
        taken = {key.domain: key.taken for key in counts}
        with use_domain([taken["fog"], "night", taken["rain"]]):
            for result, expected in zip(together, infer(model, batch), strict=True):
                assert_same(result, expected)


@slowly
def test_the_predictor_without_a_domain(tmp_path):
    model = make_detector("nearest")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    predictor = DefaultPredictor(make_cfg(*PAIRS, RULE, "nearest", "MODEL.WEIGHTS", str(tmp_path / "model.pth")))
    image, results = make_batch()[0]["image"].permute(1, 2, 0).numpy(), {}
    results["nearest"] = predictor(image)["instances"]
    for rule in ("mixture", "mini_batch", "blend", "stream"):
        with applying_rule(predictor.model, rule):
            results[rule] = predictor(image)["instances"]
    with applying_rule(predictor.model, "fallback", fallback_domain="night"):
        results["fallback"] = predictor(image)["instances"]
    with use_domain("night"):
        assert_same(results["fallback"], predictor(image)["instances"])
    with applying_rule(predictor.model, "error"), pytest.raises(DomainError, match="stem"):
        predictor(image)
    heatmaps = {rule: result.pred_keypoint_heatmaps for rule, result in results.items()}
    assert all(torch.isfinite(heatmap).all() and len(heatmap) for heatmap in heatmaps.values())
    assert not torch.equal(heatmaps["mixture"], heatmaps["mini_batch"])

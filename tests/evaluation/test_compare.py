"""Same checkpoint, which statistics? Each kind is what it says; the model is as before; the words say the numbers."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from bnext.checkpoints.checkpointer import load_model
from bnext.cli.compare import run_comparison
from bnext.data.batches import build_validation_batches
from bnext.errors import ConfigError, StatisticsError
from bnext.evaluation import evaluate_model
from bnext.evaluation.compare import compare_statistics, read_three_ways
from bnext.evaluation.compare_report import draw_comparison, format_comparison
from bnext.evaluation.reestimate import recompute_statistics
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.layers import LevelBatchNorm2d
from bnext.repair.kinds import KINDS, find_obstacle
from tests import tiny
from tests.markdown import read_tables
from tests.saved import ON

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
NO_BN = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "")
NO_BN += ("MODEL.BNEXT.RETINANET.POPULATION", "per_level", "MODEL.BNEXT.RETINANET.AFFINE", "shared")


def load(output, *opts, config=tiny.CONFIG):
    return tiny.load(output, *ON, *opts, config=config)


@pytest.fixture(scope="module")
def weights(finished):
    return str(Path(finished[0].OUTPUT_DIR, "model_final.pth"))


@pytest.fixture(scope="module")
def compared(weights, tmp_path_factory):
    """All kinds, the model, and its state before."""
    cfg = load(tmp_path_factory.mktemp("compared"), "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    model = load_model(cfg, weights)
    before = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    results = compare_statistics(cfg, model, domain_dataset="digits_train")
    assert torch.equal(generator, torch.get_rng_state())
    return cfg, model, before, results


def test_every_kind_is_measured_and_the_model_is_as_before(compared):
    _, model, (state, modes), results = compared
    assert list(results["rows"]) == list(KINDS)
    assert not results["not_applicable"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert {module.spec.inference for module in model.modules() if hasattr(module, "spec")} == {"population"}
    assert set(results["reports"]) == {"precise", "mean_of_batches", "per_level", "per_domain", "adaptive"}
    assert results["reports"]["precise"]["num_samples"] == 8
    assert results["reports"]["adaptive"]["num_samples"] == 4, "the test images"
    assert results["reports"]["per_domain"]["num_samples"] == 12, "all images of the set"


def test_rows_are_what_evaluations_by_hand_give(compared, weights, tmp_path):
    cfg, _, _, results = compared
    assert (
        results["rows"]["moving_average"]["bbox/AP50"] == evaluate_model(cfg, load_model(cfg, weights))["bbox"]["AP50"]
    )
    model = load_model(cfg, weights)
    recompute_statistics(cfg, model)
    assert results["rows"]["precise"]["bbox/AP50"] == evaluate_model(cfg, model)["bbox"]["AP50"]
    per_image = {"MODEL.BNEXT.RETINANET.INFERENCE": "mini_batch", "MODEL.BNEXT.RESNETS.INFERENCE": "mini_batch"}
    pairs = [word for pair in per_image.items() for word in pair]
    per_image_cfg = load(tmp_path, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, *pairs)
    expected = evaluate_model(per_image_cfg, load_model(per_image_cfg, weights))["bbox"]["AP50"]
    assert results["rows"]["mini_batch"]["bbox/AP50"] == expected


def test_the_three_losses_are_those_of_the_three_ways(compared):
    cfg, model, _, results = compared
    reading = results["reading"]
    one_batch = cfg.clone()
    one_batch.defrost()
    one_batch.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES = 1
    for way, name, statistics in (
        ("mini_batch_train", "digits_train", "mini_batch"),
        ("mini_batch_val", "digits_val", "mini_batch"),
        ("population_val", "digits_val", "population"),
    ):
        batches = build_validation_batches(one_batch, name)
        expected = compute_validation_loss(model, batches, statistics=statistics, seed=cfg.SEED)["total_loss"]
        assert reading[way]["loss"] == pytest.approx(expected, rel=1e-6)
        assert "bbox/AP" in reading[way]
    parts = reading["mini_batch_train"]["loss"] + reading["generalization_gap"] + reading["inconsistency"]
    assert parts == pytest.approx(reading["population_val"]["loss"])
    assert reading["population_val"]["bbox/AP"] == results["rows"]["moving_average"]["bbox/AP"]


def test_statistics_that_are_wrong_are_an_inconsistency(compared):
    cfg, model, _, results = compared
    wrong = copy.deepcopy(model)
    for module in wrong.modules():
        if isinstance(module, LevelBatchNorm2d):
            module.running_var.mul_(1e-6)
    reading, right = read_three_ways(cfg, wrong), results["reading"]
    assert reading["inconsistency"] > right["inconsistency"] + 0.1
    for way in ("mini_batch_train", "mini_batch_val"):
        assert reading[way]["loss"] == right[way]["loss"]


def test_a_kind_that_is_asked_for_twice_is_measured_once(weights, tmp_path):
    cfg, seen = load(tmp_path), []
    kinds = ["precise", "moving_average", "precise"]
    results = compare_statistics(cfg, load_model(cfg, weights), kinds, on_kind=lambda results: seen.append(1))
    assert list(results["rows"]) == ["precise", "moving_average"]
    assert len(seen) == 2


def test_kinds_that_do_not_apply_are_said(weights, tmp_path):
    model = build_model(load(tmp_path, *NO_BN))
    assert find_obstacle(model, "moving_average") is None
    assert "no batch norm" in find_obstacle(model, "precise")
    with pytest.raises(ConfigError, match="kinds"):
        compare_statistics(load(tmp_path, *NO_BN), model, ["precise", "adaptive"])
    results = compare_statistics(load(tmp_path, *NO_BN), model.eval(), ["moving_average", "mini_batch"])
    assert list(results["rows"]) == ["moving_average"]
    assert "no batch norm" in results["reading"]["not_applicable"]
    text = format_comparison(results)
    assert "each image: does not apply, as the model has no batch norm" in text
    (table,) = read_tables(text)
    assert len(table) == 2
    draw_comparison(results, tmp_path / "plot.png")
    leveled = load_model(load(tmp_path, "MODEL.BNEXT.RETINANET.POPULATION", "per_level"), weights)
    assert "per level already" in find_obstacle(leveled, "per_level")
    assert "several levels" in find_obstacle(build_model(load(tmp_path, config=tiny.RCNN)), "per_level")


def test_a_mask_rcnn_has_box_and_mask_ap(digits, tmp_path):
    torch.manual_seed(0)
    cfg = load(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, config=tiny.RCNN)
    model = build_model(cfg).eval()
    results = compare_statistics(cfg, model, ["moving_average", "precise", "adaptive"])
    assert all({"bbox/AP", "segm/AP"} <= set(row) for row in results["rows"].values())
    assert "mask AP" in format_comparison(results)
    box = "roi_heads.box_head.conv1.norm"
    counts = {
        kind: {row["path"]: row["count"] for row in report["estimates"]} for kind, report in results["reports"].items()
    }
    assert counts["precise"][box] == 4 * 16 * 49, "RoIs sampled as in training"
    assert 0 < counts["adaptive"][box] <= 4 * 16 * 49


def test_labels_are_needed(weights, tmp_path, digits):
    records = [{k: v for k, v in r.items() if k != "annotations"} for r in DatasetCatalog.get("digits_val")]
    DatasetCatalog.register("digits_bare", lambda: records)
    try:
        cfg = load(tmp_path, "DATASETS.TEST", "('digits_bare',)")
        with pytest.raises(ConfigError, match="digits_bare"):
            compare_statistics(cfg, build_model(cfg))
    finally:
        DatasetCatalog.remove("digits_bare")
        MetadataCatalog.pop("digits_bare", None)


def test_activations_that_are_not_finite_are_named_and_the_model_stays(weights, tmp_path):
    cfg = load(tmp_path)
    model = load_model(cfg, weights)
    with torch.no_grad():
        model.backbone.bottom_up.res3[0].conv1.weight[0, 0, 0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StatisticsError, match=r"res3\.0\.conv1\.norm"):
        compare_statistics(cfg, model, ["precise"])
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())


def test_a_kind_that_fails_is_said_and_the_others_go_on(weights, tmp_path):
    cfg = load(tmp_path)
    model = load_model(cfg, weights)
    with torch.no_grad():
        model.backbone.bottom_up.res3[0].conv1.weight[0, 0, 0, 0] = float("nan")
    results = compare_statistics(cfg, model, ["precise", "moving_average", "adaptive"])
    assert list(results["rows"]) == ["moving_average"]
    for kind in ("precise", "adaptive"):
        assert "res3.0.conv1.norm" in results["not_applicable"][kind]
        assert "\n" not in results["not_applicable"][kind]
    assert "adaptive: of the test images: does not apply, as activations" in format_comparison(results)


def test_a_single_element_under_a_norm_of_torch_is_named(digits, tmp_path):
    """64 pixels are one at p7."""
    plain = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BNEXT.RETINANET.POPULATION", "per_level")
    cfg = load(tmp_path, *plain, "MODEL.BNEXT.RETINANET.AFFINE", "shared")
    model = build_model(cfg).eval()
    results = compare_statistics(cfg, model, ["mini_batch", "precise"])
    assert list(results["rows"]) == ["precise"]
    assert "more than 1 element per channel at inference too; got 1 (head." in results["not_applicable"]["mini_batch"]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.running_mean is not None for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_reading_that_fails_leaves_the_table(weights, tmp_path):
    records = [{**DatasetCatalog.get("digits_train")[0], "file_name": "/nowhere/1.png"}]
    DatasetCatalog.register("digits_gone", lambda: records)
    try:
        cfg = load(tmp_path, "DATASETS.TRAIN", "('digits_gone',)")
        results = compare_statistics(cfg, load_model(cfg, weights), ["moving_average"])
    finally:
        DatasetCatalog.remove("digits_gone")
    assert list(results["rows"]) == ["moving_average"]
    assert "/nowhere/1.png" in results["reading"]["not_applicable"]


DOMAINS = ("MODEL.BNEXT.RESNETS.POPULATION", "per_domain", "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")


def test_the_domain_of_the_images_is_needed_where_norms_have_domains(weights, tmp_path):
    cfg = load(tmp_path, *DOMAINS, "MODEL.WEIGHTS", weights)
    for compare in (run_comparison, lambda cfg: compare_statistics(cfg, None)):
        with pytest.raises(ConfigError, match="DATASETS.DOMAINS.TEST"):
            compare(cfg)
    with pytest.raises(ConfigError, match="dusk"):
        run_comparison(cfg, domain="dusk")
    with pytest.raises(ConfigError, match="day"):
        run_comparison(load(tmp_path, "MODEL.WEIGHTS", weights), domain="day")
    assert not list(tmp_path.iterdir())


def test_everything_is_of_the_domain_that_was_named(weights, tmp_path):
    cfg = load(tmp_path, *DOMAINS)
    results = compare_statistics(cfg, load_model(cfg, weights), ["moving_average", "adaptive"], domain="night")
    assert list(results["rows"]) == ["moving_average", "adaptive"]
    assert results["domain"] == "night"
    counts = {tuple(row["levels"]): row["count"] for row in results["reports"]["adaptive"]["estimates"]}
    assert counts["day",] == 0 < counts["night",]
    assert "loss" in results["reading"]["population_val"]
    by_set = load(tmp_path, *DOMAINS, "DATASETS.DOMAINS.TEST", "('night',)")
    same = compare_statistics(by_set, load_model(by_set, weights), ["adaptive"])
    assert same["domain"] == "night"
    assert same["reports"] == {"adaptive": results["reports"]["adaptive"]}
    node = "MODEL.BNEXT.DOMAINS"
    fallback = load(tmp_path, *DOMAINS, f"{node}.UNSEEN", "fallback", f"{node}.FALLBACK", "day")
    assert compare_statistics(fallback, load_model(fallback, weights), ["moving_average"])["rows"]

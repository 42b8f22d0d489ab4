"""Re-estimation in a training and of a checkpoint, on real images."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from bnext.data.loader import TrainLoader, build_train_loader, count_fixed_images
from bnext.data.mapping import build_mapper
from bnext.engine import train
from bnext.errors import CheckpointError, ConfigError, StatisticsError
from bnext.evaluation.reestimate import needs_labels, recompute_statistics, repair_checkpoint
from bnext.layers import TABLE5_ROWS
from tests import tiny
from tests.saved import save

BOX, MASK = "roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn1.norm"
# Of detectron2's mapper, for masks that pycocotools has decoded.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
KEYS = ("STATISTICS", "POPULATION", "AFFINE")


def row_opts(row):
    pairs = zip(KEYS, TABLE5_ROWS[row], strict=True)
    return [item for key, value in pairs for item in (f"MODEL.BNEXT.RETINANET.{key}", value)]


@pytest.mark.parametrize("row", [1, 3, 6])
def test_precise_bn_in_a_training_writes_what_is_evaluated(digits, tmp_path, row):
    """fvcore's estimate, which detectron2's hook uses, fails on every row."""
    opts = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "SOLVER.MAX_ITER", 2]
    train(tiny.load(tmp_path, *opts, *row_opts(row)))
    state = torch.load(Path(tmp_path, "model_final.pth"))["model"]
    counters = {key: int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert set(counters.values()) == {2}
    assert any(key.startswith("backbone") for key in counters)
    assert any(key.startswith("head") for key in counters)


def test_repair_changes_the_statistics_of_the_head_alone(finished, tmp_path):
    cfg, _ = finished
    weights = Path(cfg.OUTPUT_DIR, "model_final.pth")
    before = weights.read_bytes()
    repair_checkpoint(tiny.load(tmp_path, "TEST.PRECISE_BN.NUM_ITER", 2, *row_opts(6)), str(weights))
    assert weights.read_bytes() == before
    old, new = torch.load(weights)["model"], torch.load(tmp_path / "model_final.pth")["model"]
    same = [key for key in old if key in new and torch.equal(old[key], new[key])]
    assert set(same) >= {key for key in old if key.startswith("backbone")}
    assert {key for key in new if key not in same} == {
        f"head.{tower}.1.p{level}.{name}"
        for tower in ("cls_subnet", "bbox_subnet")
        for level in range(3, 8)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_repair_does_not_write_over_its_input(digits, tmp_path):
    """It is refused before the checkpoint is read: this is none."""
    weights = tmp_path / "model_final.pth"
    weights.write_text("no checkpoint")
    (tmp_path / "link.pth").symlink_to(weights)
    for path in (str(weights), str(tmp_path / "link.pth"), f"{weights}?matching_heuristics=True"):
        with pytest.raises(ConfigError, match="OUTPUT_DIR must be another folder"):
            repair_checkpoint(tiny.load(tmp_path), path)
    assert weights.read_text() == "no checkpoint"


def test_repair_of_another_architecture_is_refused(digits, tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="every parameter"):
        repair_checkpoint(tiny.load(tmp_path / "out"), str(tmp_path / "other.pth"))


def load_rcnn(output, *opts):
    return tiny.load(output, "TEST.PRECISE_BN.NUM_ITER", 2, *opts, config=tiny.RCNN)


def read_generators():
    """The states of the CPU's random numbers, and of every GPU's: RoIs are sampled where the model is."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def recompute_rcnn(cfg, outer_seed=1):
    """Elements per channel that each norm has seen, and the running means, of a model that is always the same."""
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.manual_seed(outer_seed)
    before, modes = read_generators(), [module.training for module in model.modules()]
    report = recompute_statistics(cfg, model)
    assert all(torch.equal(*pair) for pair in zip(before, read_generators(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert not report.not_reached
    return {estimate.path: estimate.count for estimate in report.estimates}, model.get_submodule(BOX).running_mean


@pytest.mark.parametrize("shuffle", ["none", "statistics", "features"])
def test_rois_as_in_training_or_as_at_test(digits, tmp_path, shuffle):
    """Four images: as many RoIs per image as SGD samples; or the top-scored, and the detections of the mask head."""
    groups = ("MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE_GROUPS", 2 if shuffle == "statistics" else 0)
    opts = ("MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE", shuffle, *groups, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    sampled, mean = recompute_rcnn(load_rcnn(tmp_path, *opts))
    again, same = recompute_rcnn(load_rcnn(tmp_path, *opts), outer_seed=2)
    top_scored, other = recompute_rcnn(load_rcnn(tmp_path, *opts, "TEST.BNEXT.PRECISE_BN.ROIS", "top_scored"))
    assert sampled == again
    assert torch.equal(mean, same)
    assert sampled[BOX] == 4 * 16 * 49
    assert top_scored[BOX] <= 4 * 16 * 49
    assert top_scored[MASK] == 4 * 8 * 196 > sampled[MASK] > 0
    assert not torch.equal(mean, other)
    assert {path: sampled[path] for path in sampled if path.startswith("backbone")}.items() <= top_scored.items()


def test_another_seed_samples_other_rois(digits, tmp_path):
    opts = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4)
    _, mean = recompute_rcnn(load_rcnn(tmp_path, *opts))
    _, other = recompute_rcnn(load_rcnn(tmp_path, *opts, "SEED", 8))
    assert not torch.equal(mean, other)


def test_random_numbers_and_modes_after_a_failure(digits, tmp_path):
    cfg = load_rcnn(tmp_path)
    model = build_model(cfg)
    model.roi_heads.mask_head.eval()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    model.roi_heads.mask_head.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(OSError("on purpose")))
    before = torch.get_rng_state()
    with pytest.raises((OSError, StatisticsError), match="on purpose"):
        recompute_statistics(cfg, model)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_precise_bn_in_the_training_of_an_r_cnn(digits, tmp_path):
    opts = ("TEST.PRECISE_BN.ENABLED", True, "SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 0, "VIS_PERIOD", 1)
    train(load_rcnn(tmp_path, *opts, "DATASETS.TEST", ()))
    state = torch.load(Path(tmp_path, "model_final.pth"))["model"]
    counters = {key: int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert set(counters.values()) == {2}
    assert any(key.startswith("roi_heads") for key in counters)


def test_estimator_and_tolerance_of_the_config(digits, tmp_path):
    """Precise statistics in a training and of a checkpoint: one mechanism, the same keys."""
    keys = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 12, "SOLVER.IMS_PER_BATCH", 2)
    means = {}
    for estimator in ("pooled", "mean_of_batches", "moving_average"):
        cfg = tiny.load(tmp_path, *keys, "TEST.BNEXT.PRECISE_BN.ESTIMATOR", estimator)
        torch.manual_seed(0)
        model = build_model(cfg)
        assert recompute_statistics(cfg, model).num_batches == 12
        means[estimator] = model.backbone.bottom_up.stem.conv1.norm.running_var.clone()
    assert len({tuple(value.tolist()) for value in means.values()}) == 3
    cfg = tiny.load(tmp_path, *keys, "TEST.BNEXT.PRECISE_BN.TOLERANCE", 10.0)
    report = recompute_statistics(cfg, build_model(cfg))
    assert (report.num_batches, report.tolerance) == (8, 10.0)


def test_only_as_much_is_run_as_the_norms_see(digits, tmp_path):
    """An R-CNN whose norms are all in its backbone needs no labels, and runs nothing else."""
    opts = ("MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", "")
    cfg = load_rcnn(tmp_path, *opts)
    model = build_model(cfg)
    model.roi_heads.register_forward_pre_hook(lambda *args: pytest.fail("the RoI heads were run"))
    assert not needs_labels(cfg, model)
    assert recompute_statistics(cfg, model).num_batches == 2
    assert needs_labels(load_rcnn(tmp_path), build_model(load_rcnn(tmp_path)))
    top_scored = load_rcnn(tmp_path, "TEST.BNEXT.PRECISE_BN.ROIS", "top_scored")
    assert not needs_labels(top_scored, build_model(top_scored))


def test_a_repair_does_not_ask_for_itself(digits, tmp_path, bnext_log):
    weights = save(tmp_path / "in.pth", tiny.CONFIG, *row_opts(3))
    repair_checkpoint(tiny.load(tmp_path, *row_opts(4), "TEST.PRECISE_BN.NUM_ITER", 2), str(weights))
    assert "re-estimated" in bnext_log.text
    assert "are unknown" not in bnext_log.text


def test_errors_are_for_the_training_set_where_its_images_come_again_as_they_are(digits, tmp_path):
    """Twelve images in six batches: the first norm knows them all; images that are drawn nobody ever does."""

    def run(flip, sizes, **options):
        opts = ("INPUT.RANDOM_FLIP", flip, "INPUT.MIN_SIZE_TRAIN", sizes, "SOLVER.IMS_PER_BATCH", 2)
        cfg = tiny.load(tmp_path, "TEST.PRECISE_BN.NUM_ITER", 6, *opts)
        return recompute_statistics(cfg, build_model(cfg), **options)

    report = run("none", "(64,)")
    errors = {estimate.path: estimate.error for estimate in report.estimates}
    assert report.population_size == report.num_samples == 12
    assert [path for path, error in errors.items() if error == 0] == ["backbone.bottom_up.stem.conv1.norm"]
    assert run("horizontal", "(64,)", num_batches=2).population_size is None
    assert run("none", "(48, 64)", num_batches=2).population_size is None


def test_training_images_that_are_padded_by_their_batch_are_no_finite_set(digits, tmp_path):
    cfg = tiny.load(tmp_path, "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", "(64,)")
    loader = build_train_loader(cfg)
    assert count_fixed_images(cfg, loader) == 12
    records = [{"height": 64, "width": 64 + index} for index in range(12)]
    assert count_fixed_images(cfg, TrainLoader(records, build_mapper(cfg, True), loader.sampler)) is None


def test_small_groups_before_what_is_measured_are_said(digits, tmp_path, caplog):
    """By default alone: layer by layer no mini-batch normalizes."""
    small = ("MODEL.BNEXT.RETINANET.NORMALIZATION_BATCH_SIZE", 2, "SOLVER.IMS_PER_BATCH", 4)
    for estimator in ("layer_by_layer", "pooled"):
        assert "behind mini-batches of 2" not in caplog.text
        batches = [[{"image": torch.rand(3, 64, 64)} for _ in range(4)] for _ in range(2)]
        cfg = tiny.load(tmp_path, *small)
        recompute_statistics(cfg, build_model(cfg), in_head, batches=batches, estimator=estimator)
    assert "behind mini-batches of 2, the normalization batch size" in caplog.text


def in_head(path, norm):
    return path.startswith("head.")

"""The study of RoIs: configs that are what their rows claim, a training of two iterations, what is refused."""

import json

import pytest
import torch
from table3_6 import DEFAULT_ROWS, HEADS, ROWS, check_names, format_table, load_rows, order_rows, run_rows

from bnext.config import load_config
from bnext.config.recipe import read_place
from bnext.errors import ConfigError
from bnext.layers import NormSpec
from tests.markdown import read_tables
from tests.tiny import ROOT

PROJECT = ROOT / "projects/RethinkingBatchNorm"
TRAINED = sorted({row.trained for row in ROWS.values()})
ONE = ["SOLVER.IMS_PER_BATCH", "1"]
TINY = [*ONE, "SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
TINY += ["TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"]


def config_file(row, dataset="digits"):
    return str(PROJECT / f"configs/{dataset}/table3_6_{ROWS[row].trained}.yaml")


def load(rows, output, *opts, num_workers=1):
    return load_rows({row: config_file(row) for row in rows}, str(output), opts, num_workers)


def test_rows_come_after_the_row_that_they_are_made_from():
    assert order_rows(["bn_1_mini_batch"]) == ["bn_1", "bn_1_mini_batch"]
    assert order_rows(["none", "bn_2_mini_batch", "shuffle_1"]) == ["bn_2", "bn_2_mini_batch", "shuffle_1", "none"]
    assert tuple(order_rows(DEFAULT_ROWS)) == DEFAULT_ROWS


def test_the_papers_numbers():
    assert len(TRAINED) == 7
    assert {row for row in ROWS if ROWS[row].paper is None} == {"bn_1_top_scored"}
    assert [ROWS[row].paper for row in ("bn_1", "bn_1_mini_batch", "syncbn")] == [
        (30.7, 27.9),
        (41.5, 37.0),
        (41.7, 37.7),
    ]


@pytest.mark.parametrize("dataset", ["digits", "coco"])
@pytest.mark.parametrize("row", TRAINED)
def test_configs_are_what_their_rows_claim(row, dataset):
    cfg = load_config(config_file(row, dataset), ["MODEL.DEVICE", "cpu"])
    expected = ROWS[row]
    for head in HEADS:
        norm = read_place(cfg, head).norm
        assert expected.shuffle == cfg.MODEL.BNEXT[head].SHUFFLE
        if expected.norm in ("GN", ""):
            assert norm == expected.norm
        else:
            is_shared = expected.norm == "SyncBN" or expected.shuffle == "statistics"
            assert norm == NormSpec(workers="all" if is_shared else "one")
    assert (cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC) == (4, 1)
    assert cfg.MODEL.RESNETS.NORM in ("GN", "FrozenBN"), "the backbone must not have a mini-batch of one image"
    assert cfg.MODEL.FPN.NORM in ("GN", "")
    assert (expected.norm not in ("GN", "")) == cfg.TEST.PRECISE_BN.ENABLED
    num_workers = {"digits": 2, "coco": 8}[dataset]
    assert num_workers * (expected.images or {"digits": 1, "coco": 2}[dataset]) == cfg.SOLVER.IMS_PER_BATCH


@pytest.mark.parametrize("row", TRAINED)
def test_coco_rows_have_the_papers_schedule_by_the_linear_rule(row):
    cfg = load_config(config_file(row, "coco"), ["MODEL.DEVICE", "cpu"])
    factor = 16 // cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.BASE_LR * factor == 0.02
    assert [iteration // factor for iteration in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)] == [
        210_000,
        250_000,
        270_000,
    ]
    assert not cfg.TEST.PRECISE_BN.ENABLED or cfg.TEST.PRECISE_BN.NUM_ITER * cfg.SOLVER.IMS_PER_BATCH == 4000
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2


def test_digits_rows_see_the_same_number_of_images():
    configs = [load_config(config_file(row), ["MODEL.DEVICE", "cpu"]) for row in TRAINED]
    assert len({cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.MAX_ITER for cfg in configs}) == 1
    assert len({cfg.SOLVER.IMS_PER_BATCH * cfg.TEST.PRECISE_BN.NUM_ITER for cfg in configs}) == 1


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # detectron2's reading of masks
def test_one_training_is_evaluated_with_three_statistics(digits, tmp_path, capsys):
    rows = ["bn_1", "bn_1_top_scored", "bn_1_mini_batch"]
    configs = load(rows, tmp_path, *TINY)
    assert [configs["bn_1_mini_batch"].MODEL.BNEXT[head].INFERENCE for head in HEADS] == ["mini_batch"] * 2
    assert [configs[row].TEST.BNEXT.PRECISE_BN.ROIS for row in rows] == ["sampled", "top_scored", "sampled"]
    run_rows(configs, str(tmp_path), "digits")
    first, other = (torch.load(tmp_path / row / "model_final.pth")["model"] for row in rows[:2])
    differ = {key for key in first if not torch.equal(first[key], other[key])}
    heads = {key for key in first if key.rpartition(".")[2] in ("running_mean", "running_var") and "_head." in key}
    assert {key for key in differ if "num_batches" not in key} == heads != set()
    assert not (tmp_path / "bn_1_mini_batch/model_final.pth").exists(), "no statistics of its own"
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == rows
    assert all({"bbox/AP", "segm/AP"} <= set(metrics) for metrics in results["rows"].values())
    steps = {"train_and_evaluate_row_bn_1", "reestimate_row_bn_1_top_scored", "evaluate_row_bn_1_mini_batch"}
    assert steps <= set(results["seconds"])
    assert "30.7" in capsys.readouterr().out


def test_table_shows_ours_beside_the_papers():
    rows = {"syncbn": {"bbox/AP": 27.46, "segm/AP": 22.9}, "bn_1_top_scored": {"bbox/AP": 0.0}}
    ((_, above, below),) = read_tables(format_table({"rows": rows}, "digits"))
    top_scored = "population of top-scored RoIs"
    assert above == [
        "bn_1_top_scored",
        "per-worker BN",
        "1",
        top_scored,
        "bn_1 re-estimated",
        "0.0",
        "0.0",
        "n.r.",
        "n.r.",
    ]
    assert below == ["syncbn", "SyncBN", "-", "population", "trained", "27.5", "22.9", "41.7", "37.7"]


def test_rows_that_there_are_not_are_refused():
    with pytest.raises(ConfigError, match="bn_3, row1"):
        check_names(["bn_3", "syncbn", "row1"])


def test_images_of_a_worker_are_those_of_the_row(digits, tmp_path):
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH"):
        load(["bn_1"], tmp_path)
    assert load(["syncbn"], tmp_path)["syncbn"].SOLVER.IMS_PER_BATCH == 2


def test_a_config_of_another_row_is_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match="ROI_BOX_HEAD"):
        load_rows({"shuffle_1": config_file("bn_1")}, str(tmp_path), ONE)
    with pytest.raises(ConfigError, match="ROI_MASK_HEAD"):
        load(["bn_1"], tmp_path, *ONE, "MODEL.BNEXT.ROI_MASK_HEAD.INFERENCE", "mini_batch")


def test_pairs_do_not_turn_a_row_into_another(digits, tmp_path):
    with pytest.raises(ConfigError, match="PRECISE_BN.ROIS"):
        load(["bn_1"], tmp_path, *ONE, "TEST.BNEXT.PRECISE_BN.ROIS", "top_scored")
    with pytest.raises(ConfigError, match="--num-gpus"):
        load(["shuffle_1"], tmp_path, *ONE)

"""The study of six rows, on a training of two iterations: what is trained, re-estimated, written and printed."""

import json
from pathlib import Path

import pytest
import torch
from table5 import PAPER_AP, format_table, load_rows, order_rows, run_rows

from bnext.errors import BNextError, ConfigError
from tests.tiny import ROOT

CONFIGS = ROOT / "projects/RethinkingBatchNorm/configs/digits"
TINY = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4"]
TINY += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
TINY += ["TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16"]


def config_files(*rows):
    return {row: str(CONFIGS / f"table5_row{row}.yaml") for row in rows}


def test_rows_come_after_the_row_that_they_are_made_from():
    assert order_rows([4]) == [3, 4]
    assert order_rows([6, 2, 1]) == [1, 2, 5, 6]


def test_two_rows_share_their_weights_and_differ_in_statistics(digits, tmp_path, capsys):
    configs = load_rows(config_files(3, 4), str(tmp_path), TINY)
    run_rows(configs, str(tmp_path), "digits")
    before, after = (torch.load(tmp_path / f"row{row}/model_final.pth", weights_only=False)["model"] for row in (3, 4))
    weights = [key for key in before if key.endswith(("weight", "bias"))]
    assert len(weights) > 50
    assert all(torch.equal(before[key], after[key]) for key in weights)
    levels = [after[f"head.cls_subnet.1.p{level}.running_mean"] for level in (3, 4, 5)]
    assert not torch.equal(levels[0], levels[1])
    assert "head.cls_subnet.1.running_mean" not in after
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) == {"3", "4"}
    assert all(0 <= results["rows"][row]["bbox/AP"] <= 100 for row in ("3", "4"))
    assert {"train_and_evaluate_row3", "reestimate_row4", "evaluate_row4"} <= set(results["seconds"])
    assert "34.1" in capsys.readouterr().out


def test_resume_goes_on_and_a_new_study_does_not(digits, tmp_path):
    run_rows(load_rows(config_files(3), str(tmp_path), TINY), str(tmp_path), "digits")
    first = torch.load(tmp_path / "row3/model_final.pth", weights_only=False)
    longer = load_rows(config_files(3), str(tmp_path), [*TINY, "SOLVER.MAX_ITER", "3"])
    run_rows(longer, str(tmp_path), "digits", resume=True)
    second = torch.load(tmp_path / "row3/model_final.pth", weights_only=False)
    assert (first["iteration"], second["iteration"]) == (1, 2)
    stale = tmp_path / "row3/last_checkpoint"
    stale.write_text("model_of_an_earlier_study.pth")
    run_rows(load_rows(config_files(3), str(tmp_path), TINY), str(tmp_path), "digits")
    assert stale.read_text() == "model_final.pth"


def test_table_shows_ours_beside_the_papers():
    results = {"rows": {"3": {"bbox/AP": 1.25}, "4": {"bbox/AP": 31.5}}}
    table = format_table(results, "digits")
    for figure in ("1.2", "31.5", "+30.2", "+5.0", str(PAPER_AP[3]), str(PAPER_AP[4])):
        assert figure in table


def test_a_config_of_another_row_is_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match="row 4"):
        load_rows({4: str(CONFIGS / "table5_row3.yaml")}, str(tmp_path))


def test_a_missing_data_set_is_found_before_training(tmp_path):
    files = {row: str(Path(file).parents[1] / "coco" / Path(file).name) for row, file in config_files(3).items()}
    with pytest.raises(BNextError, match="coco_2017_train"):
        load_rows(files, str(tmp_path))

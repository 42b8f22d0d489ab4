"""The study of six rows, on a training of two iterations: what is trained, re-estimated, written and printed."""

import json

import pytest
import torch
from table5 import PAPER_AP, format_table, list_trainings, load_rows, run_rows

from bnext.errors import BNextError, ConfigError
from tests.tiny import ROOT

CONFIGS = ROOT / "projects/RethinkingBatchNorm/configs/digits"
TINY = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4"]
TINY += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
TINY += ["TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16"]


def load(output, *rows, opts=TINY, folder=CONFIGS):
    return load_rows(str(folder), str(output), list_trainings(rows), opts)


def test_rows_come_after_the_row_that_they_are_made_from():
    assert list_trainings([4]) == [(3, 1), (4, 1)]
    assert list_trainings([6, 2, 1], [1, 2]) == [
        *((row, 1) for row in (1, 2, 5, 6)),
        *((row, 2) for row in (1, 2, 5, 6)),
    ]


def test_two_rows_share_their_weights_and_differ_in_statistics(digits, tmp_path, capsys):
    configs = load(tmp_path, 3, 4)
    run_rows(configs, str(tmp_path), "digits")
    before, after = (
        torch.load(tmp_path / f"row{row}_seed1/model_final.pth", weights_only=False)["model"] for row in (3, 4)
    )
    weights = [key for key in before if key.endswith(("weight", "bias"))]
    assert len(weights) > 50
    assert all(torch.equal(before[key], after[key]) for key in weights)
    levels = [after[f"head.cls_subnet.1.p{level}.running_mean"] for level in (3, 4, 5)]
    assert not torch.equal(levels[0], levels[1])
    assert "head.cls_subnet.1.running_mean" not in after
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) == {"3, seed 1", "4, seed 1"}
    assert all(0 <= results["rows"][row]["bbox/AP"] <= 100 for row in results["rows"])
    assert {"train_and_evaluate_row3_seed1", "reestimate_row4_seed1", "evaluate_row4_seed1"} <= set(results["seconds"])
    assert "34.1" in capsys.readouterr().out


def test_resume_goes_on_and_a_new_study_does_not(digits, tmp_path):
    run_rows(load(tmp_path, 3), str(tmp_path), "digits")
    first = torch.load(tmp_path / "row3_seed1/model_final.pth", weights_only=False)
    longer = load(tmp_path, 3, opts=[*TINY, "SOLVER.MAX_ITER", "3"])
    run_rows(longer, str(tmp_path), "digits", resume=True)
    second = torch.load(tmp_path / "row3_seed1/model_final.pth", weights_only=False)
    assert (first["iteration"], second["iteration"]) == (1, 2)
    stale = tmp_path / "row3_seed1/last_checkpoint"
    stale.write_text("model_of_an_earlier_study.pth")
    run_rows(load(tmp_path, 3), str(tmp_path), "digits")
    assert stale.read_text() == "model_final.pth"


def test_table_shows_ours_beside_the_papers():
    aps = {"3, seed 1": 1.0, "4, seed 1": 31.5, "3, seed 2": 1.5, "4, seed 2": 32.0, "1, seed 1": 7.0}
    table = format_table({"rows": {name: {"bbox/AP": ap} for name, ap in aps.items()}}, "digits")
    for figure in ("7.0", "1.2 ± 0.4", "31.8 ± 0.4", "+30.5 ± 0.0", "+5.0", str(PAPER_AP[3]), str(PAPER_AP[4])):
        assert figure in table


def test_a_config_of_another_row_is_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match="row 4"):
        load(tmp_path, 4, opts=["MODEL.BNEXT.RETINANET.POPULATION", "shared"])


def test_a_seed_among_the_pairs_is_refused(digits, tmp_path):
    with pytest.raises(ConfigError, match="SEED"):
        load(tmp_path, 3, opts=["SEED", "2"])


def test_a_missing_data_set_is_found_before_training(tmp_path):
    with pytest.raises(BNextError, match="coco_2017_train"):
        load(tmp_path, 3, opts=[], folder=CONFIGS.parent / "coco")

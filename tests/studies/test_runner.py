"""Folders, results and resuming of studies, and refusals before anything runs."""

import json
import math
from pathlib import Path

import pytest

from bnext.errors import ConfigError
from bnext.evaluation.coco import flatten_metrics
from bnext.studies.runner import check_rows, load_row, run_study, timed
from tests import tiny


def study(output, ap, resume=False, rows=("a", "b")):
    """A study whose rows only report a number."""
    configs = {row: load_row(str(tiny.CONFIG), str(output), f"row_{row}") for row in rows}

    def run_row(row, configs, seconds, resume):
        with timed(seconds, f"row_{row}"):
            return {"bbox": {"AP": ap}, "segm": {"AP": ap / 2}}

    run_study(configs, str(output), run_row, "row {}".format, json.dumps, resume=resume)
    return json.loads(Path(output, "results.json").read_text())


def test_results_have_each_row_and_each_step(tmp_path, capsys):
    results = study(tmp_path, ap=10.0)
    assert results["rows"] == {"a": {"bbox/AP": 10.0}, "b": {"bbox/AP": 10.0}}
    assert set(results["seconds"]) == {"row_a", "row_b"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert "digits_train" in (tmp_path / "row_a/config.yaml").read_text()


def test_a_resumed_study_keeps_rows_and_checkpoints_and_a_new_one_does_not(tmp_path):
    study(tmp_path, ap=10.0)
    last = tmp_path / "row_b/last_checkpoint"
    last.write_text("model_0000001.pth")
    assert study(tmp_path, ap=20.0, resume=True, rows=("b",))["rows"]["a"] == {"bbox/AP": 10.0}
    assert last.exists()
    assert set(study(tmp_path, ap=20.0, rows=("b",))["rows"]) == {"b"}
    assert not last.exists()


def test_seconds_of_an_interrupted_step_are_added_up():
    seconds = {"train": 100.0}
    with timed(seconds, "train"):
        pass
    assert 100 <= seconds["train"] < 101


def test_nothing_detected_is_no_ap_and_no_objects_are_no_number():
    nothing = {"bbox": {"AP": math.nan, "APl": math.nan}}
    assert flatten_metrics(nothing) == {"bbox/AP": 0.0, "bbox/APl": 0.0}
    some = {"bbox": {"AP": 12.5, "APl": math.nan}, "segm": {"AP": 10.0}}
    assert flatten_metrics(some) == {"bbox/AP": 12.5, "bbox/APl": None}
    assert flatten_metrics(some, ("bbox", "segm"))["segm/AP"] == 10.0


def test_every_row_has_its_own_folder(tmp_path):
    with pytest.raises(ConfigError, match="OUTPUT_DIR"):
        load_row(str(tiny.CONFIG), str(tmp_path), "row_a", ["OUTPUT_DIR", "elsewhere"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.PRECISE_BN.NUM_ITER", "0"),
        ("DATASETS.TEST", "()"),
        ("DATASETS.TEST", "('digits_val', 'digits_train')"),
    ],
)
def test_what_no_row_can_run_with_is_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"{key}.*row a"):
        check_rows({"a": load_row(str(tiny.CONFIG), str(tmp_path), "row_a", [key, value])})

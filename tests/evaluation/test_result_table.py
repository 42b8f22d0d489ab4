"""One table of an evaluation, and the categories that are found worst."""

import math

from bnext.evaluation.result_table import format_results
from tests.markdown import read_tables


def test_tasks_share_a_table_and_the_worst_categories_are_named():
    box = {"AP": 20.04, "APl": math.nan, **{f"AP-c{number}": float(number) for number in range(7, 0, -1)}}
    mask = {"AP": 10.0, "APl": 5.0, "AP-c1": math.nan}
    results = {"bbox": box, "segm": mask, "keypoints": {"AP": 3.0}, "time": 5.0}
    text = format_results("Evaluation.", results, {"bbox": {"AR1": 7.0}, "segm": {"AR1": 8.0}}, "results.json")

    head, categories, *_ = text.splitlines()
    assert head == "Evaluation."
    assert "c1: 1.0, c2: 2.0, c3: 3.0, c4: 4.0, c5: 5.0 and 2 more (results.json)" in categories
    assert read_tables(text) == [
        [["", "AP", "APl", "AR1"], ["bbox", "20.0", "-", "7.0"], ["segm", "10.0", "5.0", "8.0"]],
        [["", "AP"], ["keypoints", "3.0"]],
    ]


def test_nothing_measured_is_the_head_alone():
    assert format_results("Evaluation.", {}) == "Evaluation."

"""One table of an evaluation, and the categories that are found worst."""

import math

from bnext.evaluation.result_table import format_results


def test_tasks_share_a_table_and_the_worst_categories_are_named():
    box = {"AP": 20.04, "APl": math.nan, **{f"AP-c{number}": float(number) for number in range(7, 0, -1)}}
    mask = {"AP": 10.0, "APl": 5.0, "AP-c1": math.nan}
    results = {"bbox": box, "segm": mask, "keypoints": {"AP": 3.0}, "time": 5.0}
    text = format_results("Evaluation.", results, {"bbox": {"AR1": 7.0}, "segm": {"AR1": 8.0}}, "results.json")

    head, names, _, first, second, other, _, third, words = text.splitlines()
    assert head == "Evaluation."
    assert [cell.strip() for cell in names.split("|")[2:-1]] == ["AP", "APl", "AR1"]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == ["bbox", "20.0", "-", "7.0"]
    assert [cell.strip() for cell in second.split("|")[1:-1]] == ["segm", "10.0", "5.0", "8.0"]
    assert [cell.strip() for cell in other.split("|")[2:-1]] == ["AP"]
    assert "3.0" in third
    assert "c1: 1.0, c2: 2.0, c3: 3.0, c4: 4.0, c5: 5.0 and 2 more (results.json)" in words

"""The command line: what it writes, and what it refuses in one line."""

import json
from pathlib import Path

import compare_statistics
import pytest

from bnext.cli import compare
from bnext.engine.launch import count_cores
from bnext.evaluation import compare as evaluation_compare
from bnext.repair import KINDS
from tests import tiny
from tests.tools.conftest import QUICK


@pytest.fixture
def command(weights, tmp_path):
    def run(*arguments):
        start = ["--config-file", str(tiny.CONFIG), "--output", str(tmp_path / "out")]
        pairs = ["MODEL.WEIGHTS", str(weights), *QUICK]
        return compare_statistics.main([*start, *pairs, *map(str, arguments)])

    return run


def test_a_table_json_and_a_plot(command, tmp_path, capsys):
    assert command("--kinds", "moving_average", "adaptive", "--target-dataset", "digits_train") == 0
    results = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert (results["dataset"], list(results["rows"])) == ("digits_train", ["moving_average", "adaptive"])
    assert results["reports"]["adaptive"]["num_samples"] == 12
    assert (tmp_path / "out" / "statistics.png").stat().st_size > 5000
    assert "adaptive: of the test images" in capsys.readouterr().out
    assert command("--kinds", "moving_average", "TEST.DETECTIONS_PER_IMAGE", "7", "--overwrite") == 0  # as pairs
    assert "does not apply" not in capsys.readouterr().out
    assert command("--kinds", "moving_average") == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kinds", "best"), "--kinds"),
        (("--target-dataset", "digits_nope"), "digits_nope"),
        (("MODEL.WEIGHTS", "absent.pth"), "'absent.pth'"),
        (("--domain", "dusk"), "--domain"),
        (("--num-gpus", "1000"), "--num-gpus"),
        (("--domain-dataset", "digits_nope"), "digits_nope"),
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN"),
        (("MODEL.NOPE", "1"), "MODEL.NOPE"),
    ],
)
def test_what_is_refused_in_one_line(command, check_refused, tmp_path, arguments, message):
    check_refused(command(*arguments), message)
    assert not (tmp_path / "out" / "statistics.json").exists()


def test_an_output_that_is_a_file_is_refused(command, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert command() == 2
    assert "OUTPUT_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(("at", "kept"), [(1, False), (2, True)])
def test_an_interruption_is_one_line_and_says_what_is_kept(command, tmp_path, capsys, monkeypatch, at, kept):
    """A file of an earlier comparison is not what this one has measured."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "statistics.json").write_text("{}")
    calls, evaluate = [], evaluation_compare.evaluate_with

    def interrupt(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(evaluation_compare, "evaluate_with", interrupt)
    assert command("--kinds", "moving_average", "mini_batch", "--overwrite") == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    path = tmp_path / "out" / "statistics.json"
    if kept:
        assert line == f"interrupted; what is measured so far is in {path}."
        assert list(json.loads(path.read_text())["rows"]) == ["moving_average"]
    else:
        assert line == "interrupted; nothing is written."
        assert path.read_text() == "{}"


def test_kinds_that_are_none_are_all(command, monkeypatch):
    calls = []
    monkeypatch.setattr(compare, "run_comparison", lambda *args: calls.append(args))
    assert command("--kinds", "TEST.DETECTIONS_PER_IMAGE", "7") == 0
    cfg, kinds, *_ = calls[0]
    assert kinds == [kind for kind in KINDS if kind != "per_domain"]
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 7


@pytest.mark.slow
@pytest.mark.skipif(count_cores() < 2, reason="two workers need two cores")
def test_two_workers_are_as_one(command, tmp_path):
    results = []
    for number in (1, 2):
        assert command("--num-gpus", number, "--overwrite", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0) == 0
        results.append(json.loads((tmp_path / "out" / "statistics.json").read_text()))
    one, two = results
    assert one["rows"].keys() == two["rows"].keys()
    for kind in ("moving_average", "mini_batch"):
        assert one["rows"][kind]["bbox/AP"] == pytest.approx(two["rows"][kind]["bbox/AP"], abs=1e-3)
    assert "bbox/AP" in two["reading"]["mini_batch_train"]


def test_without_an_output_every_comparison_has_a_folder_beside_its_checkpoint(tmp_path, monkeypatch):
    calls = []

    def leave_results(cfg, *args):
        calls.append(cfg.OUTPUT_DIR)
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "statistics.json").touch()

    monkeypatch.setattr(compare, "run_comparison", leave_results)
    weights = tmp_path / "run" / "model_final.pth"
    weights.parent.mkdir()
    start = ["--config-file", str(tiny.CONFIG), "MODEL.WEIGHTS", str(weights)]
    chosen = [[], [], ["--overwrite"], ["--target-dataset", "../night"], ["OUTPUT_DIR", str(tmp_path / "mine")]]
    for words in chosen:
        assert compare_statistics.main([*start, *words]) == 0

    names = ["compare_model_final", "compare_model_final-2", "compare_model_final", "compare_model_final_on_..%2Fnight"]
    expected = [weights.parent / name for name in names]
    assert calls == [str(path) for path in (*expected, tmp_path / "mine" / "compare_model_final")]

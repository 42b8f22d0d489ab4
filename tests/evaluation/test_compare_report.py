"""The command of a comparison: what it writes, draws and refuses; and the words, which say the numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from bnext.checkpoints.checkpointer import load_model
from bnext.cli.compare import run_comparison
from bnext.errors import CheckpointError, ConfigError
from bnext.evaluation.compare import compare_statistics
from bnext.evaluation.compare_report import describe_reading, describe_rows, draw_comparison
from bnext.files import drop_nan
from tests import tiny
from tests.saved import ON

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def load(output, *opts, config=tiny.CONFIG):
    return tiny.load(output, *ON, *opts, config=config)


@pytest.fixture(scope="module")
def weights(finished):
    return str(Path(finished[0].OUTPUT_DIR, "model_final.pth"))


def test_the_command_writes_json_and_plot_and_refuses_to_do_it_again(weights, tmp_path, capsys):
    cfg = load(tmp_path, "MODEL.WEIGHTS", weights)
    before = Path(weights).read_bytes()
    run_comparison(cfg, ["moving_average", "precise"])
    assert Path(weights).read_bytes() == before
    results = json.loads((tmp_path / "statistics.json").read_text())
    assert set(results["rows"]) == {"moving_average", "precise"}
    assert "inconsistency" in results["words"]["reading"]
    assert (tmp_path / "statistics.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "same checkpoint, which statistics?" in printed
    assert "three-way reading" in printed
    with pytest.raises(ConfigError, match="--output"):
        run_comparison(cfg, ["moving_average"])


def test_what_is_refused(weights, tmp_path):
    for key, value, kind in (
        ("MODEL.WEIGHTS", "", CheckpointError),
        ("DATASETS.TEST", "()", ConfigError),
        ("DATASETS.TEST", "('digits_val', 'digits_train')", ConfigError),
    ):
        with pytest.raises(kind, match=key):
            run_comparison(load(tmp_path, "MODEL.WEIGHTS", weights, key, value))
    assert not (tmp_path / "statistics.json").exists()


def test_what_is_measured_stays_if_the_next_kind_breaks_off(weights, tmp_path, monkeypatch):
    def break_off(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bnext.evaluation.compare.recompute_statistics", break_off)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_comparison(load(tmp_path, "MODEL.WEIGHTS", weights), ["moving_average", "precise"])
    results = json.loads((tmp_path / "statistics.json").read_text())
    assert list(results["rows"]) == ["moving_average"]
    assert "bbox/AP" in results["rows"]["moving_average"]


def test_statistics_that_are_not_finite_are_no_kind_and_the_others_are_measured(weights, tmp_path, capsys):
    state = torch.load(weights)
    state["model"]["head.cls_subnet.1.running_mean"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    cfg = load(tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "nan.pth", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    kinds = ("moving_average", "precise", "mini_batch")
    run_comparison(cfg, kinds)
    results = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert list(results["rows"]) == list(kinds[1:])
    assert "not finite (head.cls_subnet.1)" in results["not_applicable"]["moving_average"]
    assert "not finite" in results["reading"]["not_applicable"]
    whole = compare_statistics(cfg, load_model(cfg, weights), kinds)
    assert results["rows"]["precise"] == whole["rows"]["precise"], "the estimate knows nothing of what was there before"


@pytest.mark.parametrize(("aps", "end"), [((0.0, 0.0), 1), ((None, None), 1), ((0.0, 20.0), 24.4)])
def test_the_bars_of_ap_begin_at_zero(tmp_path, monkeypatch, aps, end):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    rows = dict(zip(("moving_average", "precise"), ({"bbox/AP": ap} for ap in aps), strict=True))
    draw_comparison({"rows": rows, "dataset": "own", "reading": {"not_applicable": "no labels"}}, tmp_path / "plot.png")
    assert kept[0].axes[0].get_xlim() == pytest.approx((0, end))


def test_json_has_null_where_there_is_no_number():
    value = {"loss": math.inf, "rows": [math.nan, ("a", 1.5, -math.inf)], "why": None, "done": True, "number": 3}
    expected = {"loss": None, "rows": [None, ["a", 1.5, None]], "why": None, "done": True, "number": 3}
    assert drop_nan(value) == expected


def test_words_say_which_way_and_how_much():
    rows = {"moving_average": {"bbox/AP": 21.4}, "precise": {"bbox/AP": 34.6}, "per_level": {"bbox/AP": 2.1}}
    words = describe_rows({**rows, "adaptive": {"bbox/AP": 21.5}})
    assert words["precise"] == "precise statistics are worth +13.2 AP: the moving average does not fit"
    assert words["per_level"].startswith("statistics of each level cost 19.3 AP")
    assert words["adaptive"].startswith("statistics of the test images change nothing (+0.1 AP)")
    assert describe_rows({"precise": {"bbox/AP": 1.0}}) == {}
    assert describe_rows({"moving_average": {"bbox/AP": 0.1}, "precise": {"bbox/AP": 0.2}}) == {}
    assert describe_rows({"moving_average": {"bbox/AP": None}, "precise": {"bbox/AP": 1.0}}) == {}


@pytest.mark.parametrize(
    ("inconsistency", "verdict"),
    [
        (0.3, "75 % of the loss"),
        (0.001, "describe what the norms see"),
        (-1, "describe"),
        (float("inf"), "a loss is not finite"),
    ],
)
def test_the_reading_in_words(inconsistency, verdict):
    reading = {way: {"loss": 0.5} for way in ("mini_batch_train", "mini_batch_val", "population_val")}
    assert verdict in describe_reading({**reading, "generalization_gap": 0.1, "inconsistency": inconsistency})

"""The command of a comparison: what it writes, draws and refuses; and the words, which say the numbers."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from bnext.checkpoints.checkpointer import load_model
from bnext.cli.compare import run_comparison
from bnext.cli.main import build_parser
from bnext.errors import CheckpointError, ConfigError
from bnext.evaluation import compare_report
from bnext.evaluation.compare import compare_statistics
from bnext.evaluation.compare_report import describe_reading, describe_rows, draw_comparison
from bnext.evaluation.verdict import judge_rows
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
    monkeypatch.setattr(compare_report, "save_figure", lambda figure, path: kept.append(figure))
    rows = dict(zip(("moving_average", "precise"), ({"bbox/AP": ap} for ap in aps), strict=True))
    draw_comparison({"rows": rows, "dataset": "own", "reading": {"not_applicable": "no labels"}}, tmp_path / "plot.png")
    assert kept[0].axes[0].get_xlim() == pytest.approx((0, end))


def test_json_has_null_where_there_is_no_number():
    value = {"loss": math.inf, "rows": [math.nan, ("a", 1.5, -math.inf)], "why": None, "done": True, "number": 3}
    expected = {"loss": None, "rows": [None, ["a", 1.5, None]], "why": None, "done": True, "number": 3}
    assert drop_nan(value) == expected


def describe(rows):
    return describe_rows({"rows": rows})


def test_words_say_which_way_and_how_much():
    rows = {"moving_average": {"bbox/AP": 21.4}, "precise": {"bbox/AP": 34.6}, "per_level": {"bbox/AP": 2.1}}
    words = describe({**rows, "adaptive": {"bbox/AP": 21.5}})
    assert words["precise"] == "precise statistics are worth +13.2 AP: the moving average does not fit"
    assert words["per_level"].startswith("statistics of each level cost 19.3 AP")
    assert words["adaptive"].startswith("statistics of the test images change nothing (+0.1 AP)")
    assert describe({"precise": {"bbox/AP": 1.0}}) == {}
    assert describe({"moving_average": {"bbox/AP": 0.1}, "precise": {"bbox/AP": 0.2}}) == {}
    assert describe({"moving_average": {"bbox/AP": None}, "precise": {"bbox/AP": 1.0}}) == {}


def compare(num_objects=None, **aps):
    rows = {kind: {"bbox/AP": ap} for kind, ap in aps.items()}
    about = {"weights": "runs/model_final.pth", "dataset": "night_val", "places": ["FPN"], "num_objects": num_objects}
    return {"rows": rows, **about, "command": ["--config-file", "my.yaml", "MODEL.FPN.NORM", "BN"]}


@pytest.mark.parametrize(
    ("aps", "winner", "gain", "advice"),
    [
        ({"moving_average": 20.0, "precise": 31.5}, "precise", 11.5, "--output runs/model_final_precise.pth"),
        ({"moving_average": 20.0, "per_level": 31.5}, "per_level", 11.5, "--population per_level"),
        ({"moving_average": 20.0, "mean_of_batches": 31.5}, "mean_of_batches", 11.5, "--estimator mean_of_batches"),
        ({"moving_average": 20.0, "adaptive": 31.5}, "adaptive", 11.5, "--dataset night_val"),
        ({"moving_average": 20.0, "mini_batch": 31.5}, "mini_batch", 11.5, "MODEL.BNEXT.FPN.INFERENCE: mini_batch"),
        ({"moving_average": 20.0, "precise": 12.0}, "moving_average", 0.0, "Keep the statistics of the file"),
        ({"moving_average": 20.0, "precise": 20.4}, "moving_average", 0.0, "less is noise"),
        ({"precise": 20.0, "adaptive": 25.0}, "adaptive", None, "are not in the table"),
        ({"precise": 20.0, "adaptive": 20.1}, None, None, "Nothing can be said"),
        ({"moving_average": 0.0, "precise": 0.9}, None, None, "Nothing can be said"),
        ({"moving_average": None, "precise": None}, None, None, "Nothing can be said"),
        ({"moving_average": float("nan"), "precise": 30.0}, None, None, "Nothing is compared"),
        ({"precise": 30.0}, None, None, "Nothing is compared"),
    ],
)
def test_the_verdict_follows_from_the_table(aps, winner, gain, advice):
    verdict = judge_rows(compare(**aps))
    assert (verdict.winner, verdict.gain) == (winner, gain)
    assert advice in verdict.words
    assert ("bnext reestimate --config-file my.yaml" in verdict.words) == ("--output" in verdict.words)


def test_what_two_objects_make_is_noise():
    aps = {"moving_average": 20.0, "precise": 28.0}
    assert judge_rows(compare(num_objects=20, **aps)).winner is None
    assert judge_rows(compare(num_objects=200, **aps)).winner == "precise"
    assert "Nothing can be said" in judge_rows(compare(num_objects=20, **aps)).words
    assert judge_rows(compare(num_objects=20, moving_average=20.0, precise=20.1)).winner == "moving_average"


def test_a_winner_that_nobody_can_use_names_the_next():
    aps = {"moving_average": 20.0, "mini_batch_as_trained": 30.0}
    assert "--kinds moving_average precise" in judge_rows(compare(**aps)).words
    assert "model_final_precise.pth" in judge_rows(compare(**aps, precise=29.0)).words
    assert "No other kind" in judge_rows(compare(**aps, precise=20.1)).words


def test_the_verdict_by_masks_is_said_where_it_is_another():
    rows = {"moving_average": {"bbox/AP": 20.0, "segm/AP": 10.0}, "precise": {"bbox/AP": 30.0, "segm/AP": 10.0}}
    rows["adaptive"] = {"bbox/AP": 20.0, "segm/AP": 18.0}
    verdict = judge_rows({"rows": rows})
    assert verdict.winner == "precise"
    assert "By mask AP it is: adaptive: of the test images (+8.0)" in verdict.words


def test_the_command_that_is_advised_is_one(tmp_path):
    words = judge_rows(compare(moving_average=20.0, adaptive=30.0)).words
    command = shlex.split(words.split("To get it: ")[1].split(" An AP on")[0])
    args = build_parser("reestimate").parse_intermixed_args(command[2:])
    assert (args.dataset, args.output) == (["night_val"], "runs/model_final_adaptive.pth")
    assert args.opts[:4] == ["MODEL.FPN.NORM", "BN", "MODEL.WEIGHTS", "runs/model_final.pth"]


GAIN = {"moving_average": 20.0, "precise": 30.0}
EQUAL = {"moving_average": 20.0, "precise": 20.1}
ZERO = {"moving_average": 0.0, "precise": 0.0}


@pytest.mark.parametrize(
    ("gap", "inconsistency", "aps", "said", "denied"),
    [
        (0.1, 0.3, GAIN, "75 % of both comes from other statistics", "lost to new"),
        (0.1, 0.3, GAIN, "the best statistics are: precise, pooled", "cannot be told"),
        (0.1, 0.3, EQUAL, "no other statistics that were measured mend it", "best statistics are"),
        (0.1, 0.3, ZERO, "cannot be told from the APs", "mend it;"),
        (-0.2, 0.3, GAIN, "lower loss than training images", "%"),
        (0.2, 0.001, GAIN, "which is a lack of generalization", "lower loss"),
        (0.001, 0.001, GAIN, "next to nothing", "lack"),
        (-0.2, 0.001, GAIN, "nothing is lost to them", "lack"),
        (0.2, -1, GAIN, "population statistics have a lower loss than mini-batches", "%"),
        (0.1, float("inf"), GAIN, "a loss is not finite", "generalization"),
    ],
)
def test_the_reading_in_words(gap, inconsistency, aps, said, denied):
    reading = {way: {"loss": 0.5} for way in ("mini_batch_train", "mini_batch_val", "population_val")}
    reading |= {"generalization_gap": gap, "inconsistency": inconsistency}
    text = describe_reading({**compare(**aps), "reading": reading})
    verdict = text.partition("In words: ")[2]
    assert said in verdict
    assert denied not in verdict
    assert "images per worker" in verdict

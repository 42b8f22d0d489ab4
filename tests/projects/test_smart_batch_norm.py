"""The four modes: what is read of a training, without moving it; refused settings; the direction of the main effect."""

import json

import mode_detector
import pytest
import torch
from mode_pictures import draw_curves, draw_detector, draw_rates
from mode_tables import format_tables, measure_change
from mode_trials import ModeSetting, list_trials
from run_smart_batch_norm import main

from bnext.errors import ConfigError
from bnext.studies.classifiers import build_classifier, measure_accuracy, train_classifier
from bnext.studies.images import Batches, load_images
from bnext.studies.trials import run_trials
from tests.markdown import read_tables

TINY = ModeSetting(rates=(0.03,), epochs=4, limit=320, batch_size=32, test_batch_sizes=(1, 96), channels=(8, 16))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_trials(list_trials(TINY), str(tmp_path_factory.mktemp("modes")), seeds=[1, 2, 3], setting=TINY)


def test_a_training_that_is_read_is_the_one_that_is_not(results):
    images = load_images("train", limit=320)
    model = build_classifier(1, channels=(8, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    train_classifier(model, Batches(images, 32, epochs=4, seed=1), optimizer=optimizer, decays=False)
    accuracy = measure_accuracy(model.eval(), load_images("val", limit=320))
    numbers = results["trials"]["bn, rate 0.03"]["1"]
    assert numbers["test"]["moving_average"]["96"] == accuracy
    assert numbers["val"]["moving_average"][-1] == accuracy


def test_population_statistics_do_not_ask_how_many_images_come_at_a_time(results):
    by_seed = results["trials"]["bn, rate 0.03"].values()
    for reading in ("moving_average", "fresh", "stale", "estimated"):
        assert all(numbers["test"][reading]["1"] == numbers["test"][reading]["96"] for numbers in by_seed), reading
    assert any(numbers["test"]["mini_batch"]["1"] != numbers["test"]["mini_batch"]["96"] for numbers in by_seed)


def test_tables_and_pictures(results, tmp_path):
    panels, tests, differences, rates = read_tables(format_tables(results))
    assert [len(table) - 1 for table in (panels, tests, differences, rates)] == [3, 6, 5, 9]
    assert all("±" in cell for row in tests[1:] for cell in row[1:])
    for draw in (draw_curves, draw_rates):
        assert draw(results, tmp_path / "picture.png").stat().st_size > 5000


def test_a_training_that_diverges_is_a_result():
    assert measure_change([10.0, None, 20.0]) != measure_change([10.0, None, 20.0])  # NaN


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 1), ("learning_rate", 0.5), ("rates", (0.03, -1.0)), ("batch_size", 0), ("test_batch_sizes", (0,))],
)
def test_settings_that_make_no_sense_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        ModeSetting(**{key: value})


@pytest.mark.parametrize(
    ("pairs", "named"),
    [(["batch_size=5000"], "size"), (["dataset=mnist", "root=/nowhere"], "mnist"), (["rate=1"], "rate")],
)
def test_what_cannot_be_run_is_one_line(pairs, named, tmp_path, capsys):
    assert main(["--parts", "net", "--output", str(tmp_path / "out"), *pairs]) == 2
    error = capsys.readouterr().err
    assert named in error.lower()
    assert error.count("\n") == 1


@pytest.mark.slow
def test_mode_3_is_worst_for_single_images_and_mode_2_most_erratic(tmp_path):
    setting = ModeSetting(rates=(0.03,))
    numbers = run_trials(list_trials(setting), str(tmp_path), seeds=[1], setting=setting)["trials"]["bn, rate 0.03"][
        "1"
    ]
    test = {reading: sizes["1"] for reading, sizes in numbers["test"].items()}
    assert max(test["mini_batch"], test["fresh"]) < 50 < 90 < test["estimated"]
    val = {reading: measure_change(curve) for reading, curve in numbers["val"].items()}
    assert val["moving_average"] > 2 * val["mini_batch"]


@pytest.mark.slow
def test_a_detector_is_read_in_all_ways(digits, tmp_path):
    opts = ["SOLVER.MAX_ITER", "8", "SOLVER.IMS_PER_BATCH", "4", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    opts += ["INPUT.MIN_SIZE_TEST", "64", "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16"]
    trials = mode_detector.list_detector_trials(str(tmp_path), [1], opts)
    results = run_trials(trials, str(tmp_path), seeds=[1])
    assert set(results["trials"]["bn"]["1"]["test"]) == {"moving_average", "mini_batch", "fresh", "stale", "estimated"}
    curves = [curve for norm in ("none", "bn") for curve in results["trials"][norm]["1"]["val"].values()]
    assert [len(curve) for curve in curves] == [mode_detector.NUM_READINGS] * 3
    assert len(read_tables(format_tables(json.loads((tmp_path / "results.json").read_text())))) == 3
    assert draw_detector(results, tmp_path / "detector.png").stat().st_size > 5000

    with pytest.raises(ConfigError, match="MAX_ITER"):
        mode_detector.list_detector_trials(str(tmp_path), [1], ["SOLVER.MAX_ITER", "9"])

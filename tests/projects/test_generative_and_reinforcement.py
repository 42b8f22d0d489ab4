"""GANs and value nets: what their ways share and how they differ, the grid and its values, refused settings."""

import pytest
import torch
from cases_pictures import draw_gan, draw_value
from cases_tables import format_tables
from gan_trials import WAYS, GanSetting, list_gan_trials, measure_distance
from grid_world import GridWorld
from run_generative_and_reinforcement import main
from value_trials import TARGETS, ValueSetting, list_value_trials

from bnext.errors import ConfigError
from bnext.studies.classifiers import build_classifier
from bnext.studies.images import load_images
from bnext.studies.trials import run_trials
from tests.markdown import read_tables


@pytest.fixture(scope="module")
def gans(tmp_path_factory):
    setting = GanSetting(steps=3)
    return run_trials(list_gan_trials(setting), str(tmp_path_factory.mktemp("gans")), seeds=[1], setting=setting)


def test_who_takes_in_moments_is_no_matter_of_the_training(gans):
    numbers = {way: gans["trials"][way]["1"] for way in WAYS}
    assert numbers["apart"]["distance"] == numbers["update_false"]["distance"] == numbers["domains"]["distance"]
    assert numbers["merged"]["distance"] != numbers["apart"]["distance"] != numbers["population"]["distance"]
    assert numbers["update_false"]["population"]["real"] == numbers["domains"]["population"]["real"]
    assert numbers["population"]["score_change"] < 1e-6 < numbers["apart"]["score_change"]


def test_tables_and_picture_of_gans(gans, tmp_path):
    told, changes, distances = read_tables(format_tables(gans))
    assert len(told) == 1 + 2 * len(WAYS)
    assert len(changes) == len(distances) == 1 + len(WAYS)
    assert draw_gan(gans, tmp_path / "gan.png").stat().st_size > 5000


def test_the_distance_of_pictures():
    classifier, digits = build_classifier(0).eval(), load_images("val").pixels
    assert abs(measure_distance(classifier, digits, digits)) < 1e-5
    assert measure_distance(classifier, 1 - digits, digits) > 10 * measure_distance(
        classifier, digits[::2], digits[1::2]
    )


def test_values_of_the_grid_are_those_of_bellman():
    world = GridWorld(discount=0.9)
    value_of = {tuple(pair.tolist()): float(best) for pair, best in zip(world.pairs, world.values.amax(1), strict=True)}
    for action in range(4):
        after, is_end = world.step(world.pairs, torch.full((len(world.pairs),), action))
        wanted = [1.0 if end else 0.9 * value_of[tuple(pair.tolist())] for pair, end in zip(after, is_end, strict=True)]
        torch.testing.assert_close(world.values[:, action], torch.tensor(wanted))
    assert world.distance.isfinite().all()


def test_tables_and_picture_of_value_nets(tmp_path):
    setting = ValueSetting(steps=4, period=2, batch_size=4, channels=4, num_estimated=16)
    results = run_trials(list_value_trials(setting), str(tmp_path), seeds=[1], setting=setting)
    learned, _ = read_tables(format_tables(results))
    assert len(learned) == 1 + len(TARGETS)
    assert draw_value(results, tmp_path / "value.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (GanSetting, "batch_size", 1),
        (GanSetting, "steps", 0),
        (ValueSetting, "discount", 1.0),
        (ValueSetting, "steps", 3),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, key, value):
    with pytest.raises(ConfigError, match=key):
        kind(**{key: value})


def test_a_setting_that_there_is_not_is_one_line(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out"), "--value", "stepps=3"]) == 2
    assert "'steps'" in capsys.readouterr().err


@pytest.mark.slow
def test_moments_that_are_not_copied_are_stale_and_make_wrong_targets(tmp_path):
    setting = ValueSetting(steps=200)
    trials = {way: trial for way, trial in list_value_trials(setting).items() if way in ("precise", "not_copied")}
    numbers = {name: each["1"] for name, each in run_trials(trials, str(tmp_path), seeds=[1])["trials"].items()}
    assert numbers["not_copied"]["staleness"] > 1 > 0.1 > numbers["precise"]["staleness"]
    assert numbers["not_copied"]["target_error"] > 3 * numbers["precise"]["target_error"]

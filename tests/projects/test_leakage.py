"""The study of leakage: what it refuses, and that nets read their mini-batches, in a quick form."""

import pytest
from leak_setting import LeakSetting, parse_pattern
from leak_trials import list_trials, load_sets
from run_leakage import main

from bnext.errors import ConfigError
from bnext.studies.results_file import read_results
from bnext.studies.setting import read_setting
from bnext.studies.trials import collect
from tests.tiny import ROOT


@pytest.mark.parametrize("words", ["16", "16 x", "a x 2", "2 x 2 x 2", "-1 x 2"])
def test_what_is_no_pattern_is_refused(words):
    with pytest.raises(ConfigError, match="K x M"):
        parse_pattern(words)


@pytest.mark.parametrize(
    "wrong", [{"model": "vgg"}, {"num_steps": 0}, {"joined_patterns": ("16 x 2",), "dataset": "cifar10"}]
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LeakSetting(**wrong)


def test_a_pattern_that_the_set_has_not_is_refused_before_anything_runs():
    setting = LeakSetting(pattern="16 x 2")
    with pytest.raises(ConfigError, match="num_classes"):
        list_trials(setting, load_sets(setting))


def test_the_committed_results_are_those_of_the_default_settings():
    results = read_results(ROOT / "projects/Leakage/results/classifier.json")
    setting = LeakSetting()
    assert read_setting(LeakSetting, results) == setting
    assert set(results["trials"]) == set(list_trials(setting, load_sets(setting)))


@pytest.mark.slow
def test_nets_of_one_class_a_mini_batch_read_it_and_random_groups_prevent_it(tmp_path):
    pairs = ["patterns=['1 x 32']", "pattern=1 x 32", "num_steps=600", "noise=0.25", "num_tests=40"]
    pairs += ["shares=[]", "lengths=[]", "noises=[]", "joined_patterns=[]"]
    arguments = ["--parts", "classifier", "--seeds", "1", "--output", str(tmp_path)]
    assert main([*arguments, *pairs]) == 0

    results = read_results(tmp_path / "classifier/results.json")
    name = "1 x 32, share 1, 600 steps, noise 0.25"
    same, population = (collect(results, name, f"error/{way}")[0] for way in ("same", "population"))
    assert population > same + 15
    assert collect(results, f"{name}, random_groups", "error/population")[0] < population - 15
    assert (tmp_path / "classifier/classifier.png").exists()

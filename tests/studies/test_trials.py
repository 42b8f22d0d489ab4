"""Trials of a study: what is run, kept and refused; spreads; settings; the arguments of a command."""

import argparse
import dataclasses
import json
import math

import pytest
import torch

from bnext.errors import BNextError, ConfigError
from bnext.studies.arguments import add_study_arguments, parse_study
from bnext.studies.results_file import show_results
from bnext.studies.setting import ImageSetting, load_setting
from bnext.studies.spread import compare, summarize
from bnext.studies.trials import collect, run_trials


@dataclasses.dataclass(frozen=True)
class Small(ImageSetting):
    """Settings of a study for tests."""

    rate: float = 0.1
    sizes: tuple[int, ...] = (2, 4)


def add_noise(seed):
    return {"error": 5.0 + seed, "curve": [1, 2], "by_way": {"population": float(torch.rand(()))}}


def test_trials_are_kept_and_only_the_missing_ones_run(tmp_path):
    calls = []

    def run(seed):
        calls.append(seed)
        if seed == 3:
            raise KeyboardInterrupt
        return add_noise(seed)

    with pytest.raises(KeyboardInterrupt):
        run_trials({"plain": run}, str(tmp_path), setting=Small())
    assert sorted(json.loads((tmp_path / "results.json").read_text())["trials"]["plain"]) == ["1", "2"]

    results = run_trials({"plain": add_noise, "other": add_noise}, str(tmp_path), setting=Small(), resume=True)
    assert calls == [1, 2, 3], "what is there is not run again"
    assert collect(results, "plain", "error") == [6, 7, 8]
    assert collect(results, "plain", "by_way/population") == collect(results, "other", "by_way/population")
    assert collect(results, "plain", "curve/1", seeds=[2]) == [2]


def test_a_number_that_is_not_finite_is_a_result(tmp_path):
    results = run_trials({"fast": lambda seed: {"loss": math.inf * seed}}, str(tmp_path), seeds=[1])
    assert results["trials"] == {"fast": {"1": {"loss": None}}}
    assert math.isnan(collect(results, "fast", "loss")[0])
    assert str(summarize(collect(results, "fast", "loss"))) == "-"


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_what_is_no_results_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match="results.json"):
        run_trials({}, str(tmp_path), resume=True)


def test_results_of_another_setting_are_refused(tmp_path):
    run_trials({"plain": add_noise}, str(tmp_path), seeds=[1], setting=Small())
    with pytest.raises(ConfigError, match=r"rate 0\.1 there, 0\.2 now"):
        run_trials({"plain": add_noise}, str(tmp_path), setting=Small(rate=0.2), resume=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BNextError, match=str(tmp_path / "file")):
        run_trials({}, str(tmp_path / "file"))


def test_a_difference_needs_seeds_and_two_spreads():
    assert compare([3.0, 3.1, 2.9], [1.0, 1.0, 1.1]).is_beyond
    assert not compare([3.0, 9.1, 2.9], [1.0, 1.0, 1.1]).is_beyond
    assert not compare([3.0], [1.0]).is_beyond
    assert compare([3.0, 4.0], [1.0, 1.0]).show(sign="+") == "+2.5 ± 0.7"


def test_settings_of_a_file_and_of_pairs(tmp_path):
    file = tmp_path / "digits.yaml"
    file.write_text("rate: 0.5\nside: 8\n")
    setting = load_setting(Small, file, ["rate=1", "sizes=[8, 16]"])
    assert (setting.rate, list(setting.sizes), setting.side) == (1.0, [8, 16], 8)


@pytest.mark.parametrize(
    ("text", "pairs", "named"),
    [
        ("rte: 1", [], "rte"),
        ("rate: fast", [], "rate"),
        ("- 1", [], "digits.yaml"),
        ("rate: [", [], "digits.yaml"),
        ("", ["rte=1"], "Did you mean 'rate'"),
        ("", ["rate"], "KEY=VALUE"),
        ("", ["rate=fast"], "fast"),
        ("", ["dataset=digts"], "digts"),
        ("", ["device=gpu"], "device"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, text, pairs, named):
    (tmp_path / "digits.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_setting(Small, tmp_path / "digits.yaml", pairs)


def test_a_file_of_settings_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_setting(Small, tmp_path / "absent.yaml")


def test_arguments_of_a_study(tmp_path):
    (tmp_path / "digits.yaml").write_text("")
    parser = argparse.ArgumentParser()
    add_study_arguments(parser, "output/x", parts=("a", "b"), configs=tmp_path)
    args = parse_study(parser, ["--seeds", "2", "rate=1", "--parts", "a", "--resume", "side=8"])
    assert (args.seeds, args.parts, args.pairs, args.resume) == ([1, 2], ["a"], ["rate=1", "side=8"], True)
    with pytest.raises(SystemExit):
        parse_study(parser, ["--seeds", "0"])


@pytest.mark.parametrize("text", ["{}", '{"setting": {"depth": 3}, "trials": {}}', '{"stories": {}}'])
def test_results_of_another_study_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)

    def format_tables(results):
        Small(**results["setting"])
        return "".join(results["trials"])

    with pytest.raises(ConfigError, match="study"):
        show_results(tmp_path / "results.json", format_tables)


@pytest.mark.parametrize("wrong", [{"side": -1}, {"limit": 0}])
def test_pictures_without_pixels_and_no_pictures_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Small(**wrong)

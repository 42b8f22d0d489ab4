"""Stories of bugs, in small: the doctor names the bug first, its remedy is followed, and what is written."""

import json

import pytest
from detector_story import DETECTOR_STORY
from mini_batch_stories import MINI_BATCH_STORIES
from perils import Extent, Outcome, Story, find_misdiagnosed, run_stories
from perils_tables import draw_stories, format_more, format_stories
from run import main
from torch import nn
from training_stories import TRAINING_STORIES

import bnext
from tests.markdown import read_tables

CLASSIFIER_STORIES = {**MINI_BATCH_STORIES, **TRAINING_STORIES}
TINY = Extent(epochs=8, images=256)  # fewer steps leave moving averages at their beginning, which is another finding
OPTS = ("SOLVER.IMS_PER_BATCH", "4", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64")
OPTS += ("MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16", "TEST.PRECISE_BN.NUM_ITER", "2")


def tell(name, story, folder, extent=TINY):
    """The outcome of a story with one seed, as it is written."""
    results = run_stories({name: story}, str(folder), 1, extent)
    return results["stories"][name]["1"]


FAST = ("averaged_weights",)
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFIER_STORIES]


@pytest.mark.parametrize("name", NAMES)
def test_the_doctor_names_the_bug_first_and_no_longer_after_its_remedy(name, tmp_path):
    story = CLASSIFIER_STORIES[name]
    seen = tell(name, story, tmp_path)
    assert find_misdiagnosed({name: story}, {"stories": {name: {"1": seen}}}) == []
    assert seen["remedy"]
    assert 0 <= seen["before"] <= 100
    assert 0 <= seen["after"] <= 100


@pytest.mark.slow
def test_the_command_that_the_doctor_gives_for_row_3_repairs_it(digits, tmp_path):
    seen = tell("row_3", DETECTOR_STORY, tmp_path, Extent(iterations=2, opts=OPTS))
    assert seen["findings"][0].startswith("BN001")
    assert not any(finding.startswith("BN001") for finding in seen["findings_after"])
    assert seen["remedy"].startswith("bnext reestimate")
    assert (tmp_path / "row_3/seed_1/repaired.pth").exists()


# ---- what is made of them


def tell_nothing(seed, extent, folder):
    """A model with a momentum of the other convention, and made-up numbers."""
    sick = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=0.9))
    well = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    numbers = (40.0 + seed, 90.0, None if seed == 1 else 95.0)
    return Outcome(*numbers, bnext.diagnose(sick), bnext.diagnose(well), {"else": 10.0 * seed})


@pytest.fixture
def told(tmp_path):
    stories = {"one": Story("a bug", "BN017", "accuracy", tell_nothing)}
    return stories, tmp_path, run_stories(stories, str(tmp_path), 3, TINY)


def test_seeds_are_told_apart_and_written(told):
    stories, folder, results = told
    assert json.loads((folder / "results.json").read_text()) == results
    assert [seen["before"] for seen in results["stories"]["one"].values()] == [41, 42, 43]
    assert find_misdiagnosed(stories, results) == []


def test_a_story_that_is_resumed_keeps_what_is_there(told):
    stories, folder, results = told
    results["stories"]["one"]["1"]["before"] = 7
    (folder / "results.json").write_text(json.dumps(results))
    again = run_stories(stories, str(folder), 4, TINY, resume=True)
    assert [seen["before"] for seen in again["stories"]["one"].values()] == [7, 42, 43, 44]
    assert run_stories(stories, str(folder), 1, TINY)["stories"]["one"]["1"]["before"] == 41


def test_other_findings_are_said(told):
    _, _, results = told
    wrong = find_misdiagnosed({"one": Story("a bug", "BN001", "accuracy", tell_nothing)}, results)
    assert len(wrong) == 3
    assert "BN017" in wrong[0]
    results["stories"]["one"]["2"]["findings_after"] = ["BN017 warning"]
    assert len(find_misdiagnosed(told[0], results)) == 1


def test_tables_and_picture_show_means_and_deviations(told):
    stories, folder, results = told
    (row,) = read_tables(format_stories(stories, results))[0][1:]
    assert row[3:] == ["BN017", "42.0 ± 1.0", "90.0 ± 0.0", "95.0 ± 0.0", "3"]
    assert "20.0 ± 10.0" in format_more(stories, results)
    assert draw_stories(stories, results, folder / "perils.png").stat().st_size > 5000


@pytest.mark.parametrize("words", [["no_story"], ["--seeds", "0"], ["--iterations", "-1"]])
def test_what_cannot_be_run_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert words[-1] in capsys.readouterr().err

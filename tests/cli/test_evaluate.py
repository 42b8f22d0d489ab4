"""`bnext evaluate`: what a training has written stays; other conditions than those of the file, and specialists."""

import contextlib
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog

from bnext.checkpoints import load_model
from bnext.cli.main import main
from bnext.evaluation.conditions import Conditions, under_conditions
from tests import saved, tiny

NORMS = ["MODEL.FPN.NORM", "BN", "MODEL.BNEXT.FPN.POPULATION", "per_domain"]
# Of files that detectron2 opens.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
KEY, NAMES = "backbone.fpn_lateral3.norm.{}.running_mean", ("day", "night")
NORMS += ["MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture(scope="module")
def two_sets(digits):
    """The validation images under two names, the day and the night."""
    metadata = MetadataCatalog.get("digits_val")
    night = {"name": "night_val", "json": metadata.json_file, "folder": metadata.image_root}
    sets = ["DATASETS.BNEXT.COCO", repr([night]), "DATASETS.TEST", "('digits_val', 'night_val')"]
    return [*sets, "DATASETS.DOMAINS.TEST", "('day', 'night')"]


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):
    return saved.save(tmp_path_factory.mktemp("domains") / "in.pth", tiny.CONFIG, *NORMS)


@pytest.fixture
def evaluate(two_sets, weights, tmp_path):
    """Runs the command on both sets: the results in a folder of OUTPUT_DIR/inference, or the exit status."""

    def run(*words, config=tiny.CONFIG):
        pairs = [*NORMS, *two_sets, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path]
        return main(["evaluate", "--config-file", str(config), *map(str, pairs), *map(str, words)])

    return run


@pytest.mark.slow
def test_statistics_are_chosen_and_the_gap_to_specialists_is_measured(evaluate, tmp_path, capsys):
    def read(folder):
        """Detections by set, and the domains."""
        path = tmp_path / "inference" / folder
        sets = [(path / name / "coco_instances_results.json").read_bytes() for name in ("digits_val", "night_val")]
        return sets, json.loads((path / "results.json").read_text())["domains"]

    assert evaluate() == 0
    (day, night), domains = read("")
    assert day == night, "both domains have the same statistics at the start"
    assert "gap" not in domains["day"]

    (tmp_path / "day.json").write_text(json.dumps({"digits_val": {"bbox": {"AP": 50.0}}}))
    assert evaluate("--statistics", "target", "--specialists", f"day={tmp_path}/day.json") == 0
    (of_target, _), domains = read("target")
    assert of_target != day
    assert domains["day"]["gap"]["bbox"] == 50.0 - domains["day"]["bbox"]["AP"]
    assert "gap" not in domains["night"]
    assert (tmp_path / "inference/target/domains.png").exists()
    assert "specialist" in capsys.readouterr().out

    assert evaluate("--domain", "night", "--statistics", "mini_batch") == 0
    (first, second), _ = read("mini_batch_as_night")
    assert first == second != day


@pytest.mark.slow
def test_another_rule_for_unseen_domains_takes_the_place_of_the_trainings(evaluate, tmp_path, capsys):
    config = tmp_path / "fallback.yaml"
    config.write_text(f"_BASE_: {tiny.CONFIG}\nMODEL: {{BNEXT: {{DOMAINS: {{UNSEEN: fallback, FALLBACK: day}}}}}}\n")
    domains = ["DATASETS.DOMAINS.TEST", "('day', 'fog')"]
    assert evaluate(*domains, config=config) == 0
    assert "night_val: 4 images of the domain 'fog'" in capsys.readouterr().out
    assert evaluate("--unseen", "mixture", *domains, config=config) == 0
    assert "mixture" in capsys.readouterr().out
    assert (tmp_path / "inference/unseen_mixture/results.json").exists()


def test_nothing_of_a_condition_stays_in_the_model(two_sets, weights):
    cfg = saved.load(weights, *NORMS, *two_sets)
    model = load_model(cfg, str(weights))
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]

    def moves(*conditions):
        """The domains whose statistics are others under these conditions, which end with an exception."""
        with contextlib.suppress(KeyError), under_conditions(cfg, model, Conditions(*conditions), "digits_val"):
            now = model.state_dict()
            moved = [name for name in NAMES if not torch.equal(now[KEY.format(name)], before[KEY.format(name)])]
            raise KeyError
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert modes == [module.training for module in model.modules()]
        return moved

    assert moves("target") == ["day"]
    assert moves("target", "night") == ["night"]
    assert moves("mini_batch", "day") == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--statistics", "tarmac"], "'target'"),
        (["--domain", "fog"], "--domain"),
        (["--specialists", "day"], "--specialists"),
        (["--specialists", "day=nowhere.json"], "nowhere.json"),
        (["DATASETS.DOMAINS.TEST", "('day', 'fog')"], "'fog'"),
        (["--unseen", "nearly"], "UNSEEN"),
    ],
)
def test_what_is_wrong_is_one_line(evaluate, tmp_path, capsys, words, named):
    assert evaluate(*words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert named in line


def test_the_configuration_of_the_training_stays(finished, tmp_path, capsys):
    folder = tmp_path / "output"
    shutil.copytree(finished[0].OUTPUT_DIR, folder)
    file = folder / "config.yaml"
    file.write_text(finished[0].dump())
    (folder / "metrics.json").touch()
    before = file.read_bytes()

    pairs = ["OUTPUT_DIR", folder, "MODEL.WEIGHTS", folder / "model_final.pth", "SEED", 77]
    assert main(["evaluate", "--config-file", str(tiny.CONFIG), *map(str, pairs)]) == 0
    assert file.read_bytes() == before
    assert yaml.safe_load(Path(folder, "inference", "config.yaml").read_text())["SEED"] == 77
    assert str(folder / "inference" / "config.yaml") in capsys.readouterr().out

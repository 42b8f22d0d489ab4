"""A LazyConfig where the commands take a YAML: train, evaluate, reestimate, compare, and what is refused."""

import json

import pytest
import torch

from bnext.cli.main import main
from tests import tiny

LAZY = str(tiny.LAZY)
pytestmark = pytest.mark.filterwarnings(  # detectron2 leaves the config's file open
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
RESULTS = "inference/results.json"


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of a training by the command."""
    folder = tmp_path_factory.mktemp("command")
    words = ["train.max_iter=2", "train.checkpointer.period=0", f"train.output_dir={folder}"]
    assert (
        main(["train", "--config-file", LAZY, *words, "TEST.PRECISE_BN.ENABLED=True", "TEST.PRECISE_BN.NUM_ITER", "1"])
        == 0
    )
    return folder


def test_evaluate_finds_what_the_training_has_found(trained, tmp_path):
    pairs = [f"train.output_dir={tmp_path}", "MODEL.WEIGHTS", f"{trained}/model_final.pth"]
    assert main(["evaluate", "--config-file", LAZY, *pairs]) == 0
    assert json.loads((tmp_path / RESULTS).read_text()) == json.loads((trained / RESULTS).read_text())


def test_reestimate_writes_what_loads_with_the_override_that_it_names(trained, tmp_path, capsys):
    weights, output = trained / "model_final.pth", tmp_path / "out.pth"
    words = ["MODEL.WEIGHTS", str(weights), "TEST.PRECISE_BN.NUM_ITER=2", "--output", str(output)]
    before = weights.read_bytes()
    assert main(["reestimate", "--config-file", LAZY, *words, "--population", "per_level"]) == 0
    assert weights.read_bytes() == before
    assert "norms.RETINANET.POPULATION: per_level" in capsys.readouterr().out
    specs = {spec["population"] for spec in torch.load(output)["norm_specs"].values() if "population" in spec}
    assert "per_level" in specs

    words = ["MODEL.WEIGHTS", str(output), "norms.RETINANET.POPULATION=per_level", f"train.output_dir={tmp_path}"]
    assert main(["evaluate", "--config-file", LAZY, *words]) == 0


def test_compare_measures_kinds(trained, tmp_path):
    words = ["MODEL.WEIGHTS", f"{trained}/model_final.pth", "TEST.PRECISE_BN.NUM_ITER=1", "--output", str(tmp_path)]
    assert main(["compare", "--config-file", LAZY, *words, "--kinds", "moving_average", "precise"]) == 0
    assert json.loads((tmp_path / "statistics.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("lines", "words", "culprit"),
    [
        ("train = dict(a=1)", [], "must have a `model`"),
        ("model = 1 / 0", [], "line 1"),
        (None, ["model.num_class=3"], "model.num_classes"),
        (None, ["SOLVER.BASE_LR", "3"], "optimizer"),
    ],
)
def test_what_is_wrong_is_one_line(digits, tmp_path, capsys, lines, words, culprit):
    file = tmp_path / "config.py"
    file.write_text(lines or tiny.LAZY.read_text())
    assert main(["train", "--config-file", str(file), f"train.output_dir={tmp_path}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert culprit in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py"]

"""The command line: what it does with its options, what it refuses in one line, and two workers as one."""

import json

import pytest
import recompute_statistics
import torch

from bnext.data.mapping import ImageMapper
from bnext.engine.launch import count_cores
from tests import tiny
from tests.tools.conftest import QUICK


@pytest.fixture
def command(weights, tmp_path):
    def run(*arguments, **replaced):
        words = {"--config-file": tiny.CONFIG, "--output": tmp_path / "out.pth", **replaced}
        start = [str(word) for pair in words.items() for word in pair]
        pairs = ["MODEL.WEIGHTS", str(weights), *QUICK]
        return recompute_statistics.main([*start[:2], *pairs, *start[2:], *map(str, arguments)])

    return run


def test_options_reach_the_estimate(command, tmp_path, capsys):
    options = ["--population", "per_level", "--dataset", "digits_val", "--num-samples", "4", "--source-samples", "3"]
    assert command(*options, "--estimator", "mean_of_batches", "--tolerance", "0.5") == 0
    said = json.loads((tmp_path / "out.json").read_text())
    assert (said["datasets"], said["estimator"], said["tolerance"]) == (["digits_val"], "mean_of_batches", 0.5)
    assert (said["source_samples"], said["num_samples"]) == (3, 4)
    assert said["keys"]["MODEL.BNEXT.RETINANET.POPULATION"] == "per_level"
    assert "MODEL.BNEXT.RETINANET.POPULATION: per_level" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "digits_nope"), "A data set must be registered; got 'digits_nope'"),
        (("--dataset", "digits_val", "--dataset", "digits_val"), "each data set once; got 'digits_val' twice"),
        (("--population", "own"), "--population must be one of"),
        (("--estimator", "best"), "TEST.BNEXT.PRECISE_BN.ESTIMATOR must be one of"),
        (("--tolerance", "-1"), "--tolerance must be 0 (none) or above; got -1.0"),
        (("--tolerance", "nan"), "--tolerance must be 0 (none) or above; got nan"),
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN must name at least one data set; got none"),
        (("--num-samples", "0"), "--num-samples must be 1 or more"),
        (("--num-gpus", "1000"), "--num-gpus must be at most"),
        (("--domain", "day"), "--domain must be given once for each --dataset"),
        (("MODEL.WEIGHTS", "absent.pth"), "'absent.pth', which does not exist"),
        (("MODEL.NOPE", "1"), "MODEL.NOPE"),
        (("--resume",), "--resume must be left out"),
    ],
)
def test_what_is_refused_in_one_line(command, check_refused, tmp_path, arguments, message):
    check_refused(command(*arguments), message)
    assert not list(tmp_path.iterdir())


def test_output_is_not_the_input_and_not_replaced(command, weights, tmp_path, capsys):
    before = weights.read_bytes()
    assert command("--overwrite", **{"--output": weights}) == 2
    assert "must be another file than MODEL.WEIGHTS" in capsys.readouterr().err
    assert weights.read_bytes() == before
    (tmp_path / "out.pth").touch()
    assert command() == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert command("--overwrite") == 0


def test_an_interruption_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    load, numbers = ImageMapper.__call__, iter(range(12))

    def interrupt(mapper, record):
        if next(numbers) == 5:
            raise KeyboardInterrupt
        return load(mapper, record)

    monkeypatch.setattr(ImageMapper, "__call__", interrupt)
    assert command("--dataset", "digits_train", "SOLVER.IMS_PER_BATCH", "2") == 130
    assert "interrupted; nothing is written." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(count_cores() < 2, reason="two workers need two cores")
def test_two_workers_are_as_one(weights, tmp_path):
    """Processes of their own: the data sets must be where the environment says."""
    states = []
    for number in (1, 2):
        output = tmp_path / f"{number}.pth"
        start = ["--config-file", str(tiny.CONFIG), "--output", str(output), "--num-gpus", str(number)]
        pairs = ["MODEL.WEIGHTS", str(weights), "DATALOADER.NUM_WORKERS", "0", "MODEL.RETINANET.NORM", "SyncBN"]
        pairs += ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.BNEXT.RETINANET.AFFINE", "shared"]
        assert recompute_statistics.main([*start, "--dataset", "digits_train", *pairs]) == 0
        states.append(torch.load(output)["model"])
    for key, value in states[0].items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)

"""Fixtures of command lines: the tiny data set, a checkpoint, and what a refusal looks like."""

import pytest
import torch
from detectron2.modeling import build_model

from tests import tiny
from tests.detector_fixtures import digits, loggers  # noqa: F401  the fixtures

QUICK = ("TEST.PRECISE_BN.NUM_ITER", "2", "DATALOADER.NUM_WORKERS", "0")


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):  # noqa: F811
    """A checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save({"model": build_model(tiny.load(folder)).state_dict()}, folder / "in.pth")
    return folder / "in.pth"


@pytest.fixture
def check_refused(capsys):
    """Called with an exit status and a message: the command has said it in one line."""

    def check(status, message):
        assert status == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ")
        assert "\n" not in line
        assert message in line

    return check

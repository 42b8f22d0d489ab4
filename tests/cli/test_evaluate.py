"""`bnext evaluate` in the OUTPUT_DIR of a training: what the training has written stays."""

import shutil
from pathlib import Path

import pytest
import yaml

from bnext.cli.main import main
from tests import tiny


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # detectron2's file
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

"""The main promise: the doctor names what is wrong with a trained model first, and its remedy mends it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

from bnext.data.digits import prepare_digits
from tests.tiny import ROOT

CONFIG = "Digits-Detection/retinanet_R_18_FPN_BN.yaml"


def run(line, folder):
    """A command of bnext in a folder, as its user types it; what it prints."""
    words = shlex.split(line)
    assert words[0] == "bnext"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(folder / "datasets")}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def evaluate(weights, folder, *pairs):
    run(
        f"bnext evaluate --config-file {CONFIG} MODEL.WEIGHTS {weights} OUTPUT_DIR out/{weights} {' '.join(pairs)}",
        folder,
    )
    results = json.loads((folder / "out" / weights / "inference" / "results.json").read_text())
    return results["digits_val"]["bbox"]["AP"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_remedy_of_row_3_repairs_it(tmp_path):
    prepare_digits(tmp_path / "datasets")
    run(f"bnext train --config-file {CONFIG} SOLVER.MAX_ITER 400 TEST.EVAL_PERIOD 0 OUTPUT_DIR trained", tmp_path)
    shown = run(f"bnext doctor --config-file {CONFIG} MODEL.WEIGHTS trained/model_final.pth --format json", tmp_path)

    first = json.loads(shown)["findings"][0]
    assert (first["code"], first["severity"]) == ("BN001", "error")
    run(first["remedy"]["command"], tmp_path)

    before = evaluate("trained/model_final.pth", tmp_path)
    after = evaluate("repaired.pth", tmp_path, "MODEL.BNEXT.RETINANET.POPULATION", "per_level")
    assert after > before + 1

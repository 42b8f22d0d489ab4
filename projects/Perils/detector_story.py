"""A detector with a plain BN in the head that all levels share: row 3 of the paper's Table 5."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from detectron2.config import CfgNode
from perils import Extent, Outcome, Story

from bnext.checkpoints import load_model
from bnext.config import load_config
from bnext.config.files import get_config_file
from bnext.data.catalog import datasets_root, ensure_digits
from bnext.diagnostics import Diagnosis
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.engine import train
from bnext.evaluation import evaluate_model
from bnext.evaluation.coco import flatten_metrics
from bnext.evaluation.doctor import examine_detector
from bnext.studies.runner import find_final_model, prepare_folder

__all__ = ["DETECTOR_STORY"]

_CONFIG = "Digits-Detection/retinanet_R_18_FPN_BN.yaml"
_PER_LEVEL = ("MODEL.BNEXT.RETINANET.POPULATION", "per_level")


def tell_row_3(seed: int, extent: Extent, folder: Path) -> Outcome:
    """RetinaNet on the digits set, its norm as people write it first."""
    ensure_digits()
    folder = folder.absolute() / f"seed_{seed}"
    file = get_config_file(_CONFIG)
    opts = ("SOLVER.MAX_ITER", str(extent.iterations), "SEED", str(seed), *extent.opts, "OUTPUT_DIR", str(folder))

    cfg = load_config(file, opts)
    prepare_folder(cfg)
    before = _read_ap(train(cfg))
    diagnosis = _examine(file, opts, find_final_model(cfg))

    weights = _follow(diagnosis, folder) or find_final_model(cfg)  # the remedy
    repaired = load_config(file, (*opts, *_PER_LEVEL, "MODEL.WEIGHTS", weights))
    after = _read_ap(evaluate_model(repaired, load_model(repaired, weights)))
    again = _examine(file, (*opts, *_PER_LEVEL), weights)
    return Outcome(before, after, None, diagnosis, again)


def _examine(file: str, opts: tuple[str, ...], weights: str) -> Diagnosis:
    """As `bnext doctor --config-file FILE MODEL.WEIGHTS WEIGHTS` does."""
    cfg: CfgNode = load_config(file, (*opts, "MODEL.WEIGHTS", weights))
    facts, _ = examine_detector(cfg, Origin("config", file, opts, weights))
    return examine_facts(facts)


def _follow(diagnosis: Diagnosis, folder: Path) -> str:
    """Run the command of the first finding; the file that it writes, or "" where there is no command."""
    command = diagnosis.findings[0].evidence.remedy.command if diagnosis.findings else ""
    words = shlex.split(command)
    if "--output" not in words:
        return ""

    environment = {**os.environ, "DETECTRON2_DATASETS": str(Path(datasets_root()).absolute())}
    written = folder / words[words.index("--output") + 1]
    written.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, check=True, stdout=sys.stderr)
    return str(written)


def _read_ap(metrics: object) -> float:
    return flatten_metrics(metrics)["bbox/AP"]


DETECTOR_STORY = Story(
    "RetinaNet with a plain BN in the head that all levels share",
    "BN001",
    "COCO AP",
    tell_row_3,
    num_seeds=1,
    num_threads=None,
)

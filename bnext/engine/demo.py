"""The main job: see a plain BN in a shared head fail, repair its checkpoint, see the difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from bnext.data.catalog import ensure_digits
from bnext.engine.checkpoint import load_model
from bnext.engine.picture import draw_detections
from bnext.engine.table5 import load_rows, run_rows

__all__ = ["run_demo"]


def run_demo(config_files: Mapping[int, str], output: str, opts: Sequence[str] = ()) -> None:
    """Train row 3, re-estimate it to row 4, print both beside the paper's numbers, and draw them.

    Args:
        config_files: row -> YAML file, for the rows 3 and 4.
        output: folder of results.json, detections.png, and a folder for each row.
        opts: KEY VALUE pairs that override both configs.

    Raises:
        BNextError: what is wrong, before training starts wherever it can be known.
    """
    print(f"digits set: {ensure_digits()}", flush=True)
    configs = load_rows(config_files, output, opts)
    run_rows(configs, output, "digits")
    before, after = (_load(configs[row]) for row in (3, 4))
    titles = {"row 3: trained": before, "row 4: re-estimated": after}
    picture = draw_detections(configs[4], titles, Path(output, "detections.png"))
    results = json.loads(Path(output, "results.json").read_text())
    print(
        f"\nThe same weights before and after: {results['rows']['3']['bbox/AP']:.1f} -> "
        f"{results['rows']['4']['bbox/AP']:.1f} AP; the re-estimation took "
        f"{results['seconds']['reestimate_row4']:.1f} s.\n{picture}\n{Path(output, 'results.json')}"
    )


def _load(cfg: CfgNode) -> nn.Module:
    return load_model(cfg, str(Path(cfg.OUTPUT_DIR, "model_final.pth")))

"""The main job, on a training of two iterations."""

import json

import torch

from bnext.cli.demo import run_demo
from tests.tiny import ROOT

CONFIGS = ROOT / "configs/Digits-Detection"
TINY = {
    "SOLVER.MAX_ITER": "2",
    "SOLVER.IMS_PER_BATCH": "4",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "TEST.PRECISE_BN.NUM_ITER": "2",
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.FPN.OUT_CHANNELS": "16",
}


def test_the_demo_trains_repairs_and_draws(digits, tmp_path, capsys):
    opts = [word for pair in TINY.items() for word in pair]
    trained, repaired = CONFIGS / "retinanet_R_18_FPN_BN.yaml", CONFIGS / "retinanet_R_18_FPN.yaml"
    run_demo(str(trained), str(repaired), str(tmp_path), opts)

    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["AP"]) == {"trained", "re-estimated"}
    assert (tmp_path / "detections.png").read_bytes().startswith(b"\x89PNG")
    assert "AP" in capsys.readouterr().out

    before, after = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"] for name in results["AP"]
    )
    assert "head.cls_subnet.1.running_mean" in before
    assert "head.cls_subnet.1.p3.running_mean" in after
    assert torch.equal(before["head.cls_subnet.0.weight"], after["head.cls_subnet.0.weight"])

"""FCOS with the same six rows, where the installed detectron2 has FCOS."""

import pytest

pytest.importorskip("detectron2.modeling.meta_arch.fcos")

import torch

from bnext.layers import LevelBatchNorm2d
from tests.heads.detectors import LEVELS, make_batch, make_detector, run_step


@pytest.mark.parametrize("row", [1, 6])  # the towers are run as RetinaNet's
def test_a_row_trains_a_step_and_infers(row):
    model = make_detector("BNextFCOS", row=row)
    norms = [module for module in model.modules() if isinstance(module, LevelBatchNorm2d)]
    assert [(norm.spec.table5_row, norm.levels) for norm in norms] == [(row, LEVELS)] * 4
    losses, gradients = run_step(model, make_batch((64, 96)))
    assert losses.keys() == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad():
        assert len(model(make_batch((64, 96)))) == 2


@pytest.mark.parametrize("norm", ["GN", ""])
def test_other_norms_are_those_of_detectron2s_head(norm):
    """The same weights in detectron2's own head, which calls each level alone."""
    from detectron2.modeling.meta_arch.fcos import FCOSHead

    model = make_detector("BNextFCOS", norm)
    features = [torch.randn(2, 32, side, side) for side in (8, 4, 2, 1, 1)]
    expected = FCOSHead.forward(model.head, features)
    for actual, right in zip(model.head(features), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))

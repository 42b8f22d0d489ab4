"""Repair on two workers: of all images together, and a failure of one is one of both."""

import pytest
import torch
from torch import nn

import bnext
from bnext.errors import BNextError
from tests.repair.heads import TowerDetector, TowerHead, make_images
from tests.workers import run_workers

IMAGES = [batch.double() for batch in make_images() + make_images(seed=1)]


def make_model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return TowerDetector(TowerHead(norm=norm)).double().eval()


def repair_on_two_workers(rank):
    share = IMAGES[rank::2]
    model = make_model()
    bnext.repair(model, share)
    statistics = {key: value for key, value in model.state_dict().items() if key.startswith("head.cls_tower.1.")}

    messages = []
    for norm, wrong in (
        (nn.SyncBatchNorm, []),
        (nn.BatchNorm2d, [torch.full_like(batch, torch.nan) for batch in share]),
    ):
        other = make_model(norm)
        with pytest.raises(BNextError) as caught:
            bnext.repair(other, share if rank == 0 else wrong)
        assert type(other.head.cls_tower[1]) is norm
        messages.append(str(caught.value))

    other = make_model()
    other.head.order = (0, 1, 2) if rank == 0 else (0, 1)
    with pytest.raises(BNextError) as caught:
        bnext.repair(other, share)
    return statistics, [*messages, str(caught.value)]


def test_workers_repair_together_or_not_at_all():
    results = run_workers(repair_on_two_workers, 2)
    alone = make_model()
    bnext.repair(alone, IMAGES)
    for statistics, messages in results:
        for key, value in statistics.items():
            if key.endswith(("mean", "var")):
                torch.testing.assert_close(value, alone.state_dict()[key], rtol=1e-10, atol=1e-12)
        assert "at least one batch" in messages[0]
        assert "same calls" in messages[2]

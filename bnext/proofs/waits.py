"""Times that the host waits for the device in a training step, as torch counts them."""

from __future__ import annotations

import warnings
from functools import partial

import torch

from bnext.proofs.cases import CASES, LAYOUTS, Case
from bnext.proofs.check import Check

__all__ = ["list_checks_of_waits"]


def list_checks_of_waits() -> list[Check]:
    """Of every case on CUDA, from its second step on: in the first, statistics are looked at."""
    return [Check("waits", name, partial(_count_waits, case), 0) for name, case in CASES.items()]


def _count_waits(case: Case, device: torch.device) -> float:
    norm = case.build().to(device)
    features = {name: x.to(device).requires_grad_() for name, x in case.draw(torch.float32, LAYOUTS["NCHW"]).items()}
    grads = [torch.ones_like(feature) for feature in features.values()]

    def run() -> None:
        torch.autograd.backward(list(case.call(norm, features).values()), grads)

    run()
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)

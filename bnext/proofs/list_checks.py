"""All checks of a device, the weightiest first."""

from __future__ import annotations

import torch

from bnext.proofs.check import Check
from bnext.proofs.parity import list_parity_checks
from bnext.proofs.speed import list_checks_of_speed
from bnext.proofs.uses import list_checks_of_uses
from bnext.proofs.waits import list_checks_of_waits

__all__ = ["list_checks"]


def list_checks(device: torch.device, quick: bool = False) -> list[Check]:
    """The checks that make sense on a device.

    Args:
        device: a GPU; a CPU to try the checks themselves.
        quick: few of them, in seconds.
    """
    checks = list_parity_checks(quick) + list_checks_of_uses(device, quick)
    if device.type == "cuda":
        checks += list_checks_of_waits()
    return checks if quick else checks + list_checks_of_speed(device)

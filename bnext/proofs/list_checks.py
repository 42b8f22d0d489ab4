"""All checks of a device, the weightiest first."""

from __future__ import annotations

from typing import get_args

import torch

from bnext import kernels
from bnext.proofs.check import Check
from bnext.proofs.parity import list_parity_checks
from bnext.proofs.speed import list_checks_of_speed
from bnext.proofs.uses import list_checks_of_uses
from bnext.proofs.waits import list_checks_of_waits

__all__ = ["list_checks"]

# That are repeated with every other kind of kernels: all that its passes can be asked for.
_TELLING = (
    "ghost",
    "renorm",
    "domains",
    "row 1",
    "row 6",
    "levels, ghost",
    "levels and domains",
    "levels of one domain",
)


def list_checks(device: torch.device, quick: bool = False) -> list[Check]:
    """The checks that make sense on a device.

    Args:
        device: a GPU, where every kind of kernels that is installed is checked; or a CPU, to try the checks themselves.
        quick: few of them, in seconds.
    """
    parity = list_parity_checks(quick)
    if quick or device.type != "cuda":
        speed = [] if quick else list_checks_of_speed(device)
        return parity + list_checks_of_uses(device, quick) + speed

    waits, speed = list_checks_of_waits(), list_checks_of_speed(device)
    checks = parity + list_checks_of_uses(device) + waits + speed
    others = [kind for kind in get_args(kernels.Kind) if kind != "torch" and kernels.find_kernels_fault(kind) is None]
    for kind in sorted(others, key=lambda kind: kind == "compiled"):  # last, as its compiler takes long
        repeated = [check for check in parity + waits if check.name in _TELLING] + speed
        checks += [check.by(kind) for check in repeated]
    return checks

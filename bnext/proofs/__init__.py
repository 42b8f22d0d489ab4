"""Proofs of norms on a device, a GPU above all: parity with float64 on a CPU, no wait of the host, and speed.

Each is a `Check`, a function of the device that gives one number and a limit for it. `bnext check-gpu` runs all of them
and writes a table; the tests of tests/gpu run each as a test. They need torch and this package alone.

Shape letters: N samples, C channels, H W, L levels.
"""

from bnext.proofs.check import Check, Outcome, run_checks
from bnext.proofs.list_checks import list_checks

__all__ = ["Check", "Outcome", "list_checks", "run_checks"]

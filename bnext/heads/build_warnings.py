"""Warnings when a model is built: what the doctor knows of it without running it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from contextvars import ContextVar

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Origin, WeightsFacts
from bnext.diagnostics.registry import find_checks, run_checks
from bnext.diagnostics.tell_findings import tell_findings
from bnext.heads.doctor_facts import add_config_facts

__all__ = ["building_unwarned", "warn_of_faults"]

log = logging.getLogger(__name__)

MORE = "`bnext doctor` says more, SOLVER.BNEXT.DOCTOR.WARN False less."

_is_unwarned: ContextVar[bool] = ContextVar("_is_unwarned", default=False)


@contextlib.contextmanager
def building_unwarned() -> Iterator[None]:
    """Say nothing of models that are built in this scope, by whoever reports on them or repairs them."""
    token = _is_unwarned.set(True)
    try:
        yield
    finally:
        _is_unwarned.reset(token)


def warn_of_faults(cfg: CfgNode, model: nn.Module) -> None:
    """Warn once of what is wrong with the norms of a new model, on the main worker.

    Args:
        cfg: of the model; SOLVER.BNEXT.DOCTOR.WARN says whether.
        model: of any architecture, before its weights are loaded. Nothing of it changes, and it is not run.

    Note:
        The doctor prevents no model: where it fails, that is logged at DEBUG.
    """
    if not cfg.SOLVER.BNEXT.DOCTOR.WARN or _is_unwarned.get() or not comm.is_main_process():
        return

    try:
        origin, weights = Origin("config", weights=cfg.MODEL.WEIGHTS), WeightsFacts(source=cfg.MODEL.WEIGHTS)
        facts = dataclasses.replace(collect_facts(model, with_layers=False), origin=origin, weights=weights)
        static = [check for check in find_checks().values() if check.depth == "static"]
        findings, failures = run_checks(add_config_facts(facts, cfg, model), static)
        tell_findings(log, findings, MORE)
    except Exception:
        log.debug("The doctor failed.", exc_info=True)
    else:
        for failure in failures:
            log.debug("%s", failure)

"""What tests of checks share: run one check on a model, as `diagnose` does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from bnext.diagnostics import diagnose
from bnext.diagnostics.findings import Evidence

__all__ = ["find"]


def find(code: str, model: nn.Module, data: Iterable[Any] | None = None, **options: Any) -> list[Evidence]:
    """The findings of one check."""
    diagnosis = diagnose(model, data, **options)
    assert not [failure for failure in diagnosis.failures if code in failure]
    return [finding.evidence for finding in diagnosis.findings if finding.code == code]

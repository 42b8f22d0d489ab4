"""What calls of norms knew: the record, as a test looks at it."""

from __future__ import annotations

from torch import nn

from bnext.functional import Groups
from bnext.layers import BatchNorm2d
from bnext.scope import CallRecord, get_record

__all__ = ["assert_nothing_is_open", "note_groups"]


def note_groups(module: nn.Module) -> dict[nn.Module, Groups | None]:
    """Norm -> the groups in its latest call from now on."""
    noted: dict[nn.Module, Groups | None] = {}

    def note(norm: nn.Module, args: object) -> None:
        noted[norm] = get_record().groups.get(norm)

    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            norm.register_forward_pre_hook(note)
    return noted


def assert_nothing_is_open() -> None:
    """No scope has left anything behind."""
    assert get_record() == CallRecord()

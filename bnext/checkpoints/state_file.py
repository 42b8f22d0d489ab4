"""The content that a checkpoint file must have, and what is said of one that has not."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
from torch import Tensor

from bnext.errors import CheckpointError, list_few

__all__ = ["UNREADABLE", "check_is_state", "explain_unreadable"]

# Raised by pickle and torch for a file that is cut, of another kind, or refused.
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    pickle.PickleError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
)


def explain_unreadable(filename: str, error: Exception) -> CheckpointError:
    """The fault of a file that torch cannot load."""
    refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return CheckpointError.of(
            "A checkpoint",
            "hold tensors and plain values only",
            got=f"a {refused[1]}, which torch does not load as it may run code",
            where=filename,
            remedy="If you trust the file, load it with torch.load(file, weights_only=False), and save its state dict "
            "again with torch.save({'model': state_dict}, file).",
        )

    reason = str(error).splitlines()[0] if str(error) else "no content"
    kind = re.match(r"'(\w+)' object has no attribute|argument of type '(\w+)'", reason)
    if kind:
        return _no_state(f"a {kind[1] or kind[2]}", filename)
    return CheckpointError.of(
        "A checkpoint",
        "be a whole file with a dictionary of tensors and plain values",
        got=f"{type(error).__name__}: {reason}",
        where=filename,
        remedy="Copy or train it again.",
    )


def check_is_state(state: Any, path: str) -> None:
    """Raise CheckpointError unless these are tensors by name."""
    if not isinstance(state, dict):
        raise _no_state(f"a {type(state).__name__}", path)

    wrong = {key: value for key, value in state.items() if not isinstance(value, (Tensor, np.ndarray))}
    if wrong or not all(isinstance(key, str) for key in state):
        entries = [f"{key!r} ({type(value).__name__})" for key, value in (wrong or state).items()]
        raise _no_state(f"a dictionary with {list_few(entries)}", path)


def _no_state(kind: str, path: str) -> CheckpointError:
    return CheckpointError.of(
        "A checkpoint",
        "hold a state dict, tensors by name, alone or under 'model'",
        got=kind,
        where=path,
        remedy="Save the model's state dict again with torch.save({'model': state_dict}, file).",
    )

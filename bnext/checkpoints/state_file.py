"""What a checkpoint file must be, and what is said of one that is not."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from bnext.errors import CheckpointError

__all__ = ["UNREADABLE", "check_is_state", "explain_unreadable", "show_keys"]

_SHOWN = 3  # keys of each kind in an error
# What pickle and torch raise for a file that is cut, of another kind, or refused.
UNREADABLE = (RuntimeError, EOFError, pickle.PickleError, ValueError, LookupError, TypeError, AttributeError)
UNREADABLE += (ImportError, AssertionError)


def explain_unreadable(filename: str, error: Exception) -> CheckpointError:
    """What is wrong with a file that torch cannot load."""
    refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return CheckpointError(
            f"A checkpoint must hold tensors and plain values only; got a {refused[1]} ({filename}), which torch does "
            "not load as it may run code. If you trust the file, load it with torch.load(file, weights_only=False), "
            "and save its state dict again with torch.save({'model': state_dict}, file)."
        )
    reason = str(error).splitlines()[0] if str(error) else "no content"
    kind = re.match(r"'(\w+)' object has no attribute|argument of type '(\w+)'", reason)
    if kind:
        return _no_state(f"a {kind[1] or kind[2]}", filename)
    return CheckpointError(
        f"A checkpoint must be a whole file with a dictionary of tensors and plain values; got {filename} "
        f"({type(error).__name__}: {reason}). Copy or train it again."
    )


def check_is_state(state: Any, path: str) -> None:
    """Raise CheckpointError unless these are tensors by name."""
    if isinstance(state, dict):
        wrong = {key: value for key, value in state.items() if not isinstance(value, (Tensor, np.ndarray))}
        if not wrong and all(isinstance(key, str) for key in state):
            return
        shown = show_keys(f"{key!r} ({type(value).__name__})" for key, value in (wrong or state).items())
        found = f"a dictionary with {shown}"
    else:
        found = f"a {type(state).__name__}"
    raise _no_state(found, path)


def _no_state(found: str, path: str) -> CheckpointError:
    return CheckpointError(
        f"A checkpoint must hold a state dict, tensors by name, alone or under 'model'; got {found} ({path}). "
        "Save the model's state dict again with torch.save({'model': state_dict}, file)."
    )


def show_keys(keys: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more if keys else "none"

"""A state dict that is laid out otherwise than the norm that loads it: its own load, whoever calls it.

`load_state_dict` of a model, detectron2's checkpointer and its `DefaultPredictor` know nothing of levels and domains.
So it is the norm that brings what it is given into its form, and says once for each load what it did to get there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from torch import Tensor

from bnext.errors import CheckpointError
from bnext.layers.norm_form import AFFINE, POPULATION, NormForm
from bnext.layers.norm_state import Note, convert_state

__all__ = ["convert_in_place", "reporting_conversions"]

_FIELDS = {*AFFINE, *POPULATION}

_LOGGER = logging.getLogger(__name__)


class _Told(threading.local):
    """Things said during one call of `load_state_dict`, which is known by the list that it collects missing keys in."""

    missing_keys: list[str] | None = None
    texts: frozenset[str] = frozenset()
    is_reported: bool = False


_told = _Told()


@contextlib.contextmanager
def reporting_conversions() -> Iterator[None]:
    """While somebody else reports what is converted, the norms say nothing."""
    before = _told.is_reported
    _told.is_reported = True
    try:
        yield
    finally:
        _told.is_reported = before


def convert_in_place(
    state_dict: dict[str, Tensor],
    prefix: str,
    form: NormForm,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Give the entries of one norm in a state dict the form of the norm that is about to load them.

    Entries that are no norm's are left to torch, which tells of them, as of those whose shape does not fit.

    Args:
        state_dict: of a part of a model that holds the norm; it is changed.
        prefix: of the norm's keys in it.
        form: of the norm.
        missing_keys, error_msgs: of `torch.nn.Module.load_state_dict`, which raises what is put into the latter.
    """
    stored = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and _is_of_a_norm(key[len(prefix) :], value):
            stored[key[len(prefix) :]] = value

    keys, shape = set(form.list_keys()), (form.num_features,)
    missing = keys - stored.keys()
    if not stored or stored.keys() == keys or (stored.keys() < keys <= _FIELDS and missing != {POPULATION[2]}):
        return  # a part of the fields of a norm without levels or domains is nothing to convert; torch says what lacks
    if any(value.dim() and tuple(value.shape) != shape for key, value in stored.items() if key in keys):
        return

    path = prefix.removesuffix(".") or "the norm"
    try:
        converted, notes = convert_state(stored, form, path)
    except CheckpointError as error:
        error_msgs.append(str(error))
        return

    for key in stored:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in converted.items()})
    _tell(path, notes, missing_keys)


def _is_of_a_norm(key: str, value: object) -> bool:
    owner, _, field = key.rpartition(".")
    if not isinstance(value, Tensor) or field not in _FIELDS or "." in owner:
        return False
    return value.is_floating_point() or field == "num_batches_tracked"


def _tell(path: str, notes: list[Note], missing_keys: list[str]) -> None:
    """Say what was done to the first norm to which it was done in a load."""
    if _told.missing_keys is not missing_keys:
        _told.missing_keys, _told.texts = missing_keys, frozenset()

    for note in notes:
        if note.text not in _told.texts and not _told.is_reported:
            _LOGGER.warning("Norm state was converted as it was loaded (%s, and others alike): %s.", path, note.text)
        _told.texts |= {note.text}

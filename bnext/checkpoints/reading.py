"""A file of weights, read whole or refused, and without running what it holds.

A zip file of torch has a checksum of each of its parts, which is compared before anything is believed. Pickles hold
instructions: torch's are read by its own reader of weights, those of arrays by one that knows arrays and plain values.
Whether the values fit a model is asked in `bnext.checkpoints.fit`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import numpy as np
import torch

from bnext.errors import CheckpointError, Refusal
from bnext.notices import tell_once

__all__ = ["read_checkpoint"]

_LOGGER = logging.getLogger(__name__)

NOT_READABLE = Refusal(
    CheckpointError, "A checkpoint", "be a file that can be read", "Mend its permissions or its disk, or copy it."
)
UNREADABLE = Refusal(
    CheckpointError,
    "A checkpoint",
    "be a whole file with a dictionary of tensors and plain values",
    "{remedy}",
)
DAMAGED = Refusal(CheckpointError, "A checkpoint", "be a whole file, as its own checksums say", "{remedy}")
TOO_LARGE = Refusal(
    CheckpointError,
    "A checkpoint",
    "fit into the memory that is free",
    "End other programs, or use a machine with more of it.",
)
HOLDS_CODE = Refusal(
    CheckpointError,
    "A checkpoint",
    "hold tensors and plain values only",
    "Save its weights alone, where the file comes from: torch.save({{'model': model.state_dict()}}, file).",
)
HOLDS_TENSORS = Refusal(
    CheckpointError,
    "A pickled checkpoint",
    "hold NumPy arrays and plain values only",
    "Save it with torch.save({{'model': model.state_dict()}}, file) instead of pickle.dump.",
)
OTHER_KIND = Refusal(CheckpointError, "A checkpoint", "be a file of torch.save, or a pickle of arrays", "{remedy}")
NO_STATE = Refusal(
    CheckpointError,
    "A checkpoint",
    "hold a state dict, tensors by name, alone or under 'model'",
    "Save the model's state dict again with torch.save({{'model': state_dict}}, file).",
)

COPY = "Copy it again from where it is whole, or use an earlier one; with --resume OUTPUT_DIR/last_checkpoint names it."
NO_CHECKSUMS = "%s has no checksums: whether it is as it was saved cannot be known."

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
_SAVE_AGAIN = "Save the weights with torch.save({'model': state_dict}, file)."
_DOWNLOAD = "Download it again: a page came in the place of the file."
_UNPACK = "Unpack it, and give the file with the weights."
# First bytes, the kind of file that they tell, and what makes a checkpoint of it.
_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS in the place of the file", "Fetch the file: git lfs pull."),
    (b"<!doctype html", "a web page", _DOWNLOAD),
    (b"<html", "a web page", _DOWNLOAD),
    (b"<?xml", "an XML file", _DOWNLOAD),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ", "an xz file", _UNPACK),
    (b"7z\xbc\xaf", "a 7z file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"\x89HDF", "an HDF5 file", _SAVE_AGAIN),
    (b"\x93NUMPY", "a single array of NumPy", _SAVE_AGAIN),
    (b"\x89PNG", "a picture", "Give the file with the weights."),
    (b"\xff\xd8\xff", "a picture", "Give the file with the weights."),
)


def read_checkpoint(file: str, address: str = "") -> dict[str, Any]:
    """The content of a file as detectron2 lays it out: the state dict under "model", and what stands beside it.

    Args:
        file: of torch.save, of any age; a pickle of arrays, as detectron2's model zoo and Caffe2 have; or of pycls.
        address: from where it was downloaded.

    Raises:
        CheckpointError: it cannot be read, is damaged, of another kind, or holds more than tensors, arrays and plain
            values.
    """
    remedy = f"Delete it, so that {address} is downloaded again." if "://" in address else COPY

    try:
        with open(file, "rb") as stream:
            content, is_pickle = _read(stream, file, remedy)
    except OSError as error:
        raise NOT_READABLE.of(f"{type(error).__name__}: {error.strerror or error}", file) from error
    except MemoryError as error:
        raise TOO_LARGE.of(f"{os.path.getsize(file):,} bytes", file) from error

    if not isinstance(content, dict):
        raise NO_STATE.of(f"a {type(content).__name__}", file)
    return _lay_out(content, file, is_pickle)


def _read(stream: BinaryIO, file: str, remedy: str) -> tuple[Any, bool]:
    """The content, and whether it is a pickle of arrays and not a file of torch."""
    head = stream.read(512)
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)

    if head.startswith(b"PK\x03\x04"):
        _check_zip(stream, file, remedy)
        return _load_tensors(stream, file, remedy), False
    if head.startswith(_LEGACY):
        content = _load_tensors(stream, file, remedy)
        tell_once(_LOGGER, file, NO_CHECKSUMS, file)
        return content, False

    kind = _find_other_kind(head, size)
    if kind is not None:
        raise OTHER_KIND.of(kind[0], file, remedy=kind[1])
    if not head.strip(b"\0"):
        raise UNREADABLE.of("zeros alone" if head else "an empty file", file, remedy=remedy)

    content = _load_arrays(stream, file, remedy)
    tell_once(_LOGGER, file, NO_CHECKSUMS, file)
    return content, True


def _find_other_kind(head: bytes, size: int) -> tuple[str, str] | None:
    """The kind of a file that is neither torch's nor a pickle, and what to do; None: it may be one."""
    for start, kind, remedy in _KINDS:
        if head.lstrip().lower().startswith(start.lower()):
            return kind, remedy

    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file", f"Read it with safetensors.torch.load_file(file). {_SAVE_AGAIN}"
    if head[:1] in b"{[" and _is_text(head):
        return "a JSON file", "Give the file with the weights."
    return None


def _is_text(head: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError):
        json.JSONDecoder().raw_decode(head.decode())
        return True
    return b'"' in head and all(byte >= 9 for byte in head)


# ---- torch's files


def _check_zip(stream: BinaryIO, file: str, remedy: str) -> None:
    """Refuse a zip file whose parts are not what their checksums say, or that is none of torch's."""
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
            names = [part.filename for part in parts]
            has_checksums = any(part.CRC for part in parts)
            broken = archive.testzip() if has_checksums else None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        raise UNREADABLE.of(f"a zip file that cannot be opened ({error})", file, remedy=remedy) from error
    except Exception as error:  # zlib's and struct's own, for what no zip file has
        raise DAMAGED.of(f"{type(error).__name__}: {error}", file, remedy=remedy) from error

    if broken is not None:
        raise DAMAGED.of(f"other bytes in {broken}", file, remedy=remedy)
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        kind, again = "a TorchScript archive", "Save the model's state dict: torch.save(model.state_dict(), file)."
        raise OTHER_KIND.of(kind, file, remedy=again)
    if not any(name.endswith("data.pkl") for name in names):
        kind = "an archive of NumPy" if any(name.endswith(".npy") for name in names) else "another zip file"
        raise OTHER_KIND.of(kind, file, remedy=_SAVE_AGAIN)

    if not has_checksums:
        tell_once(_LOGGER, file, NO_CHECKSUMS, file)
    stream.seek(0)


def _load_tensors(stream: BinaryIO, file: str, remedy: str) -> Any:
    try:
        with _allowing_plain_values(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and old storages: a refusal says enough
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever pickle and torch raise for a file that is cut, or of another kind
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error

        # Of torch's own words only a name is passed on: they advise to load the file without any care.
        refused = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+\.\w+)'>", str(error))
        if refused and isinstance(error, pickle.UnpicklingError):
            name = next(filter(None, refused.groups()))
            raise HOLDS_CODE.of(f"a {name}, which may run code when it is loaded", file) from error
        if "Unsupported operand" in str(error):
            raise HOLDS_CODE.of("a pickle of another protocol than torch.save's", file) from error

        text = "".join(str(error).splitlines()[:1]) if not isinstance(error, pickle.UnpicklingError) else ""
        raise UNREADABLE.of(f"{type(error).__name__}: {text}" if text else "no pickle", file, remedy=remedy) from error


def _allowing_plain_values() -> AbstractContextManager[Any]:
    """Numbers and arrays of NumPy and the arguments of a command line may stand beside the weights."""
    allow = getattr(torch.serialization, "safe_globals", None)  # not in 2.4, which refuses them
    return allow(_list_plain_values()) if allow else contextlib.nullcontext()


def _list_plain_values() -> list[Any]:
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}
    names = [name for name in _PLAIN if name.startswith("numpy.") and "multiarray" in name]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *(_rename(_PLAIN[name], name) for name in names)]


def _rename(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function under the name by which a file calls it: NumPy 1 and 2 have others for the same."""

    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__module__, _, renamed.__name__ = name.rpartition(".")
    renamed.__qualname__ = renamed.__name__
    return renamed


# ---- pickles of arrays


class _ArrayUnpickler(pickle.Unpickler):
    """A reader of pickles that knows arrays and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = _PLAIN.get(f"{module}.{name}")
        if known is None:
            raise _NotPlainError(f"{module}.{name}")
        return known


class _NotPlainError(Exception):
    """A name in a pickle of which it is not known that it only makes a value."""


def _load_arrays(stream: BinaryIO, file: str, remedy: str) -> Any:
    try:
        return _ArrayUnpickler(stream, encoding="latin1").load()
    except (OSError, MemoryError):
        raise
    except _NotPlainError as error:
        name = str(error)
        refusal = HOLDS_TENSORS if name.startswith("torch.") else HOLDS_CODE
        raise refusal.of(f"a {name}, which may run code when it is loaded", file) from error
    except Exception as error:  # whatever pickle and NumPy raise for a file that is cut, or no pickle
        text = "".join(str(error).splitlines()[:1])
        raise UNREADABLE.of(f"{type(error).__name__}: {text}", file, remedy=remedy) from error


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if codecs.lookup(encoding).name not in ("iso8859-1", "utf-8", "ascii"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


def _make_array(kind: type, shape: tuple[int, ...], code: bytes | str) -> np.ndarray[Any, Any]:
    """An empty array, whose content follows in the pickle."""
    if kind is not np.ndarray or shape != (0,):
        raise ValueError(f"an array of {kind!r} and shape {shape}")
    return np.ndarray(shape, code.decode() if isinstance(code, bytes) else code)


def _read_scalar(dtype: np.dtype[Any], content: bytes | str = b"") -> Any:
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, dtype)[0]


def _read_buffer(
    content: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: str = "C", *others: Any
) -> np.ndarray[Any, Any]:
    return np.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")


def _list_names() -> dict[str, Any]:
    """Name in a pickle -> what makes the value: of both NumPys, and of both Pythons."""
    names: dict[str, Any] = {
        "collections.OrderedDict": OrderedDict,
        "argparse.Namespace": argparse.Namespace,
        "_codecs.encode": _encode,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }
    for module in ("builtins", "__builtin__"):
        names |= {f"{module}.{kind.__name__}": kind for kind in (set, frozenset, complex, bytearray)}
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray._reconstruct"] = _make_array
        names[f"{core}.multiarray.scalar"] = _read_scalar
        names[f"{core}.numeric._frombuffer"] = _read_buffer
    return names


_PLAIN = _list_names()


# ---- what detectron2 makes of a file's content


def _lay_out(content: dict[Any, Any], file: str, is_pickle: bool) -> dict[str, Any]:
    if file.endswith(".pyth"):  # pycls
        if not isinstance(content.get("model_state"), dict):
            raise NO_STATE.of(f"no 'model_state', as files of pycls (.pyth) have, but {list(content)[:3]}", file)
        state = {key: value for key, value in content["model_state"].items() if not str(key).endswith("tracked")}
        return {"model": state, "__author__": "pycls", "matching_heuristics": True}

    if "model" in content:
        return content
    if not (is_pickle and file.endswith(".pkl")):
        return {"model": content}

    blobs = content.get("blobs", content)  # of Caffe2 and the first Detectron: detectors have them, backbones do not
    if not isinstance(blobs, dict):
        raise NO_STATE.of(f"a {type(blobs).__name__} as 'blobs'", file)
    state = {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}
    return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}

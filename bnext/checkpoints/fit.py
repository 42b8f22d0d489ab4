"""Whether the state dict of a checkpoint is one, and fits the model that is to load it: asked before it does.

How a file is read is in `bnext.checkpoints.reading`; whether statistics are such that one can normalize with them in
`bnext.surgery.check_state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnext.checkpoints.reading import NO_STATE
from bnext.errors import CheckpointError, Refusal, list_few
from bnext.layers.folded_norm import FOLDED_FOR_A_NORM, FoldedNorm, is_marked_as_folded
from bnext.layers.forms import AFFINE, POPULATION, find_forms
from bnext.layers.sources import list_sources
from bnext.layers.walk import find_bnext_norms

__all__ = [
    "check_folded",
    "check_is_state",
    "check_keys",
    "check_norm_kinds",
    "check_values",
    "find_bias_of_folded_norms",
    "to_tensors",
]

StateDict = Mapping[str, Tensor]

WRONG_KIND = Refusal(
    CheckpointError, "{key}", "be of {kind}", "Use another checkpoint, or save this one again with its trained weights."
)
NOT_FINITE = Refusal(
    CheckpointError,
    "{key}",
    "be finite",
    "The training that wrote it had diverged, or the file is damaged: use an earlier checkpoint, or another one.",
)
NEGATIVE = Refusal(
    CheckpointError, "{key}", "be 0 or more", "The file is damaged: use an earlier checkpoint, or another one."
)
NO_NORMS = Refusal(
    CheckpointError,
    "The checkpoint",
    "have the state of the model's norms",
    "If they were folded into their convolutions, load the checkpoint that was folded, or, in code, call fold_norms on "
    "the model before it loads this one; else use the config that the checkpoint was trained with.",
)

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_NUMBERS = "fiuc?b"
# First parts of keys that tell who named them, and what makes them detectron2's.
_NAMES = (
    ("layer1.", "For a ResNet of torchvision or timm, detectron2's tools/convert-torchvision-to-d2.py renames them."),
    ("_orig_mod.", "They are of a compiled model: save the state dict of the one inside, model._orig_mod."),
    ("module.", "They are of a wrapped model: save the state dict of the one inside, model.module."),
)


# ---- whether it is a state dict


def check_is_state(state: Any, where: str) -> None:
    """Refuse what is not tensors by name."""
    if not isinstance(state, dict):
        raise NO_STATE.of(f"a {type(state).__name__}", where)

    wrong = {key: value for key, value in state.items() if not isinstance(value, (Tensor, np.ndarray))}
    if wrong or not state or not all(isinstance(key, str) for key in state):
        entries = [f"{key!r} ({type(value).__name__})" for key, value in (wrong or state).items()]
        raise NO_STATE.of(f"a dictionary with {list_few(entries) or 'nothing'}", where)


def to_tensors(state: dict[str, Any], where: str) -> None:
    """Put a tensor in the place of every array of NumPy.

    Raises:
        CheckpointError: an array that is not of numbers.
    """
    for key, value in state.items():
        if not isinstance(value, np.ndarray):
            continue
        if value.dtype.kind not in _NUMBERS:
            raise WRONG_KIND.of(f"{value.dtype}", where, key=key, kind="numbers")

        kind = value.dtype.newbyteorder("=") if value.dtype != np.longdouble else np.dtype(np.float64)
        state[key] = torch.from_numpy(np.array(value, kind, order="C"))  # a copy: what a file holds is not writable


# ---- values


def check_norm_kinds(state: StateDict, model: nn.Module, where: str) -> None:
    """Refuse statistics and affines of norms with which nothing can be computed: they are converted before they load.

    Args:
        state: of norms of any form.
        model: loads it.
        where: the file.
    """
    paths = tuple(f"{path}." if path else "" for path, _, _ in find_forms(model))
    for key, value in state.items():
        field = key.rpartition(".")[2]
        if field in POPULATION or (field in AFFINE and key.startswith(paths)):
            counter = torch.empty((), dtype=torch.int64)
            _check_kind(key, value, counter if field == POPULATION[2] else torch.empty(()), where)


def check_values(state: StateDict, model: nn.Module, where: str) -> None:
    """Refuse values that the model cannot have: not finite, or of another kind than its own, in any precision.

    Of a buffer they may be infinite where the model's own is, as a mask.

    Args:
        state: of norms in the model's forms.
        model: loads it; entries that it has not, or has of another shape, are passed over.
        where: the file.

    Raises:
        CheckpointError: the first entry that is wrong.
    """
    for key, entry in model.state_dict().items():
        value = state.get(key)
        if value is None or not isinstance(entry, Tensor) or value.shape != entry.shape:
            continue

        _check_kind(key, value, entry, where)
        if not _is_finite(value, entry) and (entry.is_meta or _is_finite(entry, entry)):
            wrong = value.flatten()[~torch.isfinite(_cast(value, entry)).flatten()]
            count = f"{len(wrong):,} of {value.numel():,} values" if value.numel() > 1 else "its value"
            raise NOT_FINITE.of(f"{wrong[0].item():g} in {count}", where, key=key)
        if key.endswith("num_batches_tracked") and bool((value < 0).any()):
            raise NEGATIVE.of(int(value.min()), where, key=key)


def _check_kind(key: str, value: Tensor, entry: Tensor, where: str) -> None:
    if value.is_meta or value.layout is not torch.strided or value.is_quantized:
        kind = "the meta device" if value.is_meta else f"{value.dtype} ({value.layout})"
        raise WRONG_KIND.of(kind, where, key=key, kind="dense tensors with values")

    if entry.is_floating_point() and not value.is_floating_point():
        raise WRONG_KIND.of(f"{value.dtype}", where, key=key, kind="floating numbers")
    if value.is_complex() != entry.is_complex() or (value.dtype is torch.bool) != (entry.dtype is torch.bool):
        raise WRONG_KIND.of(f"{value.dtype}", where, key=key, kind=f"the model's type, {entry.dtype}")


def _is_finite(value: Tensor, entry: Tensor) -> bool:
    """Whether all values are finite in the model's type; a finite sum tells it of most, and soonest."""
    if not value.is_floating_point() and not value.is_complex():
        return True

    value = _cast(value, entry)
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _cast(value: Tensor, entry: Tensor) -> Tensor:
    """Values in the type that they will have in the model."""
    if entry.is_floating_point() or entry.is_complex():
        value = value.to(entry.dtype)
    return value.float() if value.dtype.itemsize == 1 else value  # of so short ones torch has next to no arithmetic


# ---- norms that are folded into a convolution


def check_folded(state: StateDict, metadata: Mapping[str, Mapping[str, Any]], model: nn.Module, where: str) -> None:
    """Refuse the state of a norm that the model has folded, and of a folded model for one with norms.

    Args:
        state: as it is in the file.
        metadata: torch's, by module, where the file has them.
        model: loads it.
        where: the file.
    """
    for path, module in model.named_modules():
        if isinstance(module, FoldedNorm):
            module.check_is_folded(state, f"{path}." if path else "", f"{path}; {where}")

    folded = [path for path, _, _ in find_forms(model) if is_marked_as_folded(metadata.get(path, {}))]
    if folded:
        raise FOLDED_FOR_A_NORM.of(f"folded norms for {list_few(folded)}", where)


def find_bias_of_folded_norms(state: StateDict, model: nn.Module) -> list[str]:
    """Keys of biases for convolutions that have none, where the state dict has nothing of some norm of the model."""
    if all(_has_state(path, state) for path, _, _ in find_forms(model)):
        return []

    biases = []
    for path, module in model.named_modules():
        if isinstance(module, _WEIGHTED) and module.bias is None and f"{path}.weight" in state:
            biases.append(f"{path}.bias")
    return [key for key in biases if key in state]


def _has_state(path: str, state: StateDict) -> bool:
    """Whether a state dict has anything of the module at a path."""
    return any(key.startswith(f"{path}.") for key in state)


# ---- keys


def check_keys(state: StateDict, model: nn.Module, where: str, *, complete: bool) -> None:
    """Refuse a checkpoint of another model, or one that must be complete and is not.

    Args:
        state: of norms in the model's forms.
        model: loads it.
        where: the file.
        complete: every parameter and norm statistic must be there; otherwise one parameter is enough.
    """
    entries = model.state_dict()
    matching = {key for key, value in state.items() if key in entries and entries[key].shape == value.shape}
    required = _find_required_keys(model)
    missing = [min(names) for names in required if not names & matching]
    if len(missing) < len(required) and not (complete and missing):
        return

    if len(missing) < len(required):
        _check_has_norms(missing, state, model, where)

    mismatched = []
    for key, value in state.items():
        if key in entries and key not in matching:
            mismatched.append(f"{key} {tuple(value.shape)} instead of {tuple(entries[key].shape)}")
    unexpected = [key for key in state if key not in entries]
    lists = {
        "Missing": [key for key in missing if key not in state],
        "Unexpected": unexpected,
        "Of another shape": mismatched,
    }
    faults = " ".join(f"{title}: {list_few(keys) or 'none'}." for title, keys in lists.items())

    rule = "have every parameter and norm statistic" if complete else "share some parameter"
    got = f"{len(required) - len(missing)} of {len(required)}"
    named = [remedy for start, remedy in _NAMES if any(f".{key}".find(f".{start}") >= 0 for key in unexpected)]
    if not unexpected and not mismatched:
        named += _name_new_domains(missing, model)
    remedy = " ".join(named[:1]) or "Use the config that the checkpoint was trained with, or another checkpoint."
    raise CheckpointError.of(
        "The checkpoint", f"{rule} of the model", got=got, where=where, remedy=f"{faults} {remedy}"
    )


def _name_new_domains(missing: list[str], model: nn.Module) -> list[str]:
    """The remedy where nothing is missing but what domains own, as if they were new; none where more is."""
    domains = {}
    for path, norm in find_bnext_norms(model).items():
        for source in list_sources(norm.levels, norm.domains):
            for name in (source.domain, source.name):
                domains[f"{path}.{name}" if path else name] = source.domain

    new = dict.fromkeys(domains.get(key.rpartition(".")[0], "") for key in missing)
    if "" in new:
        return []
    commands = list_few([f"`bnext domain add {name}`" for name in new])
    return [
        f"Use {commands} with the config that the checkpoint was trained with; a training begins with the output, as "
        "MODEL.WEIGHTS."
    ]


def _check_has_norms(missing: list[str], state: StateDict, model: nn.Module, where: str) -> None:
    """Say so where nothing is missing but whole norms, as in a file of a folded model."""
    absent = [path for path, _, _ in find_forms(model) if not _has_state(path, state)]
    of_norms = [key for key in missing if any(key.startswith(f"{path}.") for path in absent)]
    if absent and of_norms == missing:
        raise NO_NORMS.of(f"nothing of {list_few(absent)}", where)


def _find_required_keys(model: nn.Module) -> list[frozenset[str]]:
    """All names of each parameter and norm statistic: a complete checkpoint has one name of each."""
    names: dict[int, set[str]] = {}
    parameters = {id(parameter) for parameter in model.parameters()}

    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in parameters or key.rpartition(".")[2] in POPULATION[:2]:
            names.setdefault(id(value), set()).add(key)

    return [frozenset(keys) for keys in names.values()]

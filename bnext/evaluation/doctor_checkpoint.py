"""The doctor of a checkpoint alone: what its file says without a config, and without running anything of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from bnext.checkpoints.fit import to_tensors
from bnext.checkpoints.reading import NO_STATE, read_checkpoint
from bnext.diagnostics.collecting.read_state import CONFIG_TO_NAME, collect_state_facts, read_state_dict
from bnext.diagnostics.facts import Facts, NormFacts, Origin, WeightsFacts
from bnext.errors import CheckpointError, list_few
from bnext.layers.norm_form import AFFINE, POPULATION

__all__ = ["ENDINGS", "add_stored_statistics", "examine_checkpoint"]

ENDINGS = (".pth", ".pt", ".pkl", ".pyth", ".ckpt", ".tar", ".bin")  # of files that are taken for checkpoints
_PREFIXES = ("module.", "_orig_mod.")  # of wrapped and compiled models
_AVERAGED = ("ema", "teacher", "average", "swa")  # in names of states beside the model's


def examine_checkpoint(file: str) -> Facts:
    """The facts of a checkpoint alone.

    Args:
        file: as `read_checkpoint` takes it. The state dict may stand at any name in it ("model", "state_dict", ...);
            an average of the weights beside it (its name has ema, teacher, average or swa) is read, too.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it has no state dict.
    """
    if not os.path.isfile(file):
        got = f"{file!r}, which " + ("is a folder" if os.path.isdir(file) else "does not exist")
        raise CheckpointError.of("A checkpoint", "be a file", got=got, remedy="Correct the path.")

    content = read_checkpoint(file)
    states = {name: _read_state(state, file) for name, state in _find_states(content)}
    if not states:
        named = content["model"] if content.keys() == {"model"} and isinstance(content["model"], Mapping) else content
        entries = [f"{key!r} ({type(value).__name__})" for key, value in named.items()]
        raise NO_STATE.of(f"a dictionary with {list_few(entries) or 'nothing'}", file)
    averaged = [name for name in states if any(word in name.lower() for word in _AVERAGED)]
    name = max((name for name in states if name not in averaged), key=lambda name: len(states[name]), default="")
    if not name:
        name = averaged.pop(0)

    origin = Origin("checkpoint", CONFIG_TO_NAME, weights=file)
    specs = content.get("norm_specs")
    facts = collect_state_facts(states[name], file, specs=specs if isinstance(specs, Mapping) else None, origin=origin)
    average = read_state_dict(states[averaged[0]])[0] if averaged else None
    return dataclasses.replace(facts, weights=_describe(facts, content, states[name], file), averaged=average)


def add_stored_statistics(facts: Facts, file: str) -> Facts:
    """Facts of a model with the state that a file has for its norms, which no model loads as something is wrong in it.

    Args:
        facts: of the model.
        file: see `examine_checkpoint`; of one that cannot be read nothing is added.
    """
    try:
        stored = examine_checkpoint(file)
    except CheckpointError:
        return facts

    norms = []
    for norm in facts.norms:
        other = stored.find_norm(norm.path)
        is_same = other is not None and other.record.num_features == norm.record.num_features
        if other is not None and is_same and _list_owners(other) == _list_owners(norm):
            norm = dataclasses.replace(norm, populations=other.populations, affines=other.affines)
        norms.append(norm)
    return dataclasses.replace(facts, norms=tuple(norms))


def _list_owners(norm: NormFacts) -> tuple[list[str], list[str]]:
    """Levels or domains of the statistics and of the affines of a norm."""
    return sorted(one.owner for one in norm.populations), sorted(affine.owner for affine in norm.affines)


def _find_states(content: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every state dict in a file, at most two dictionaries deep, with the names that lead to it."""
    for name, value in content.items():
        if not isinstance(value, Mapping):
            continue
        tensors = {key: entry for key, entry in value.items() if _is_entry(key, entry)}
        if tensors:
            yield f"{place}{name}", tensors
        elif not place:
            yield from _find_states(value, f"{name}.")


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, (Tensor, np.ndarray))


def _read_state(state: dict[str, Any], file: str) -> dict[str, Tensor]:
    to_tensors(state, file)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _describe(facts: Facts, content: Mapping[str, Any], state: Mapping[str, Tensor], file: str) -> WeightsFacts:
    """Facts that the file says of itself; names beside a norm's state that no norm of torch has are unexpected."""
    paths = {key.rpartition(".")[0] for key in state if key.endswith(POPULATION[0])}
    beside = [key for key in state if key.rpartition(".")[0] in paths]
    unexpected = tuple(key for key in beside if key.rpartition(".")[2] not in (*AFFINE, *POPULATION))

    iteration = next((content[name] for name in ("iteration", "iter", "step") if name in content), None)
    specs = content.get("norm_specs")
    said = set(specs) if isinstance(specs, Mapping) else set()
    return WeightsFacts(
        source=file,
        is_loaded=True,
        iteration=iteration if isinstance(iteration, int) else None,
        unexpected=unexpected,
        eps={norm.path: norm.record.eps for norm in facts.norms if norm.path in said},
    )

"""Facts for the doctor that a file of weights knows: what it gave to which norm, and how that came to be.

Nothing is fetched or written, and nothing that a file holds is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.checkpoints.fit import find_bias_of_folded_norms
from bnext.checkpoints.reading import read_checkpoint
from bnext.diagnostics.facts import WeightsFacts
from bnext.errors import CheckpointError
from bnext.files import find_local_file
from bnext.heads.places import find_parts
from bnext.layers.folded_norm import is_marked_as_folded
from bnext.layers.forms import AFFINE, POPULATION, NormForm, find_forms, find_state_forms
from bnext.notices import without_warnings
from bnext.numbers import is_number
from bnext.surgery.check_state import is_unwritten

__all__ = ["load_weights"]

# Weights of detectron2's model zoo whose norms have an affine alone, as its FrozenBatchNorm2d says of Caffe2's.
_FOLDED = ("detectron2://ImageNetPretrained/MSRA/", "detectron2://ImageNetPretrained/FAIR/X-")
_STATISTICS = POPULATION[:2]


def load_weights(cfg: CfgNode, model: nn.Module) -> tuple[WeightsFacts, tuple[str, ...]]:
    """Load MODEL.WEIGHTS into a model, if it is a file of this machine.

    Args:
        cfg: of the model.
        model: gets the weights, and where the file has statistics for the levels of a foreign head, norms that have
            them; as it was where they do not fit.

    Returns:
        The facts, and what could not be found out, in sentences.
    """
    source: str = cfg.MODEL.WEIGHTS
    file = find_local_file(source)
    if not file:
        return _describe_unread(source, model), ()

    checkpointer = Checkpointer(model)
    try:
        with without_warnings():
            rest = _load(checkpointer, source)
    except (CheckpointError, AssertionError) as error:  # the latter of detectron2 0.6, for a query
        is_folded = _is_folded(file, model) or None
        failure = f"The weights could not be loaded, and little is said of them: {error}"
        return WeightsFacts(source, is_folded=is_folded), (failure,)
    return _describe(source, model, checkpointer, rest), ()


def _load(checkpointer: Checkpointer, source: str) -> dict[str, Any]:
    """All else that the file holds; one with everything of the model may bring its levels along."""
    try:
        return checkpointer.load(source, checkpointables=[], complete=True)
    except CheckpointError:
        return checkpointer.load(source, checkpointables=[])


# ---- weights that were not read


def _describe_unread(source: str, model: nn.Module) -> WeightsFacts:
    if not source.startswith(_FOLDED):
        return WeightsFacts(source)

    roots = find_parts(model, "RESNETS")
    paths = [path for path, _, _ in find_forms(model) if path.startswith(tuple(f"{root}." for root in roots))]
    return WeightsFacts(source, is_folded=True, folded=tuple(paths))


def _is_folded(file: str, model: nn.Module) -> bool:
    """Whether a file that cannot be loaded is of a model that is folded where this one has norms."""
    try:
        state = read_checkpoint(file)["model"]
    except CheckpointError:
        return False

    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    if any(is_marked_as_folded(metadata.get(path, {})) for path, _, _ in find_forms(model)):
        return True
    is_state = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    return is_state and bool(find_bias_of_folded_norms(state, model))


# ---- weights that were


def _describe(source: str, model: nn.Module, checkpointer: Checkpointer, rest: Mapping[str, Any]) -> WeightsFacts:
    entries = model.state_dict()
    given = {key for key, shape in checkpointer.shapes.items() if key in entries and tuple(entries[key].shape) == shape}
    norms = [(path, form, _select(given, path)) for path, _, form in find_state_forms(model)]

    missing = tuple(path for path, _, keys in norms if not keys)
    without = tuple(path for path, form, keys in norms if _lacks_statistics(form, keys))
    specs = checkpointer.specs
    frozen = {path for path, spec in specs.items() if spec.get("frozen") in ("statistics", "both")}
    is_caffe2 = rest.get("__author__") == "Caffe2"
    folded = [path for path in without if is_caffe2]
    folded += [path for path, _, keys in norms if _is_identity(entries, path, keys, path in frozen)]

    unexpected = tuple(key for key in checkpointer.shapes if key not in entries)
    biases = find_bias_of_folded_norms(dict.fromkeys(checkpointer.shapes, torch.empty(0)), model)
    iteration = rest.get("iteration")
    return WeightsFacts(
        source,
        is_loaded=True,
        iteration=iteration if isinstance(iteration, int) else None,
        missing=missing,
        unexpected=unexpected,
        eps={path: float(spec["eps"]) for path, spec in specs.items() if is_number(spec.get("eps"))},
        is_folded=bool(folded or biases),
        folded=tuple(folded),
        without_statistics=without,
        statistics={path: str(spec["statistics"]) for path, spec in specs.items() if "statistics" in spec},
        populations={path: str(spec["population"]) for path, spec in specs.items() if "population" in spec},
    )


def _select(keys: set[str], path: str) -> set[str]:
    """Names of what was given to a norm, within it."""
    prefix = f"{path}." if path else ""
    return {key[len(prefix) :] for key in keys if key.startswith(prefix)}


def _has(keys: set[str], fields: tuple[str, ...]) -> bool:
    """Whether some of these were given, to all or to a level or domain."""
    return any(key.rpartition(".")[2] in fields for key in keys)


def _lacks_statistics(form: NormForm, keys: set[str]) -> bool:
    return form.population != "none" and _has(keys, AFFINE) and not _has(keys, _STATISTICS)


def _is_identity(entries: Mapping[str, Tensor], path: str, keys: set[str], is_frozen: bool) -> bool:
    """Whether a frozen norm was saved whose affine does all: statistics as they were made, which nobody counted."""
    prefix = f"{path}." if path else ""
    was_live = POPULATION[2] in keys and not is_frozen
    if was_live or not {*_STATISTICS, *AFFINE} <= keys:
        return False

    statistics = {name: entries[prefix + name] for name in _STATISTICS}
    return is_unwritten(statistics) and bool(entries[f"{prefix}bias"].any())

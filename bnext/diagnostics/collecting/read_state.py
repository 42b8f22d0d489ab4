"""The norms of a state dict alone: which there are, their statistics and affines, by level or domain.

A norm is seen by its running statistics. Names do not say what normalizes in training, nor eps and momentum: a spec
beside them does, where the file has one; else torch's own eps stands for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnext.diagnostics.facts import Affine, Facts, NormFacts, Origin, Population
from bnext.diagnostics.inventory import NormRecord
from bnext.errors import ConfigError, list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.norm_form import AFFINE, POPULATION
from bnext.layers.spec import NormSpec

__all__ = ["CONFIG_TO_NAME", "collect_state_facts", "read_state_dict"]

# They stand in commands for what the user has.
CONFIG_TO_NAME, FILE_TO_NAME = "CONFIG.yaml", "CHECKPOINT.pth"

_EPS = 1e-5  # of torch, and of detectron2
_FIELDS = (*AFFINE, *POPULATION)

NOT_IN_A_FILE = (
    "A checkpoint alone does not say what normalizes in training, over which mini-batches, and with which momentum; "
    f"where it does not say eps, {_EPS:g} was taken. With its config, or its model, more can be found."
)
NO_STATISTICS = (
    "No norm has running statistics there: it has no batch norm, or they are folded into other weights, or have names "
    "other than running_mean and running_var."
)
ODD = "State of norms that is no vector of numbers, or not one of all their channels, was passed over: {names}."

StateDict = Mapping[str, Tensor]
Specs = Mapping[str, Mapping[str, Any]]
Fields = dict[str, Tensor]


def collect_state_facts(
    state: StateDict, name: str = "state dict", *, specs: Specs | None = None, origin: Origin | None = None
) -> Facts:
    """The facts that a state dict says of its norms.

    Args:
        state: name -> tensor.
        name: of the file, or of whose state it is.
        specs: path of a norm -> fields of its `NormSpec`, where the file holds them.
        origin: None: a checkpoint of unknown name.
    """
    norms, odd = read_state_dict(state, specs)
    failures = [NOT_IN_A_FILE if norms else NO_STATISTICS]
    if odd:
        failures.append(ODD.format(names=list_few(odd)))

    file = Origin("checkpoint", CONFIG_TO_NAME, weights=FILE_TO_NAME)
    return Facts(
        norms=norms,
        model_name=name,
        is_training=False,
        num_parameters=sum(value.numel() for key, value in state.items() if not key.endswith(POPULATION)),
        origin=origin or file,
        failures=tuple(failures),
    )


def read_state_dict(state: StateDict, specs: Specs | None = None) -> tuple[tuple[NormFacts, ...], list[str]]:
    """The norms of a state dict, in its order, and the names of what is of no use.

    Args:
        state: name -> tensor.
        specs: see `collect_state_facts`; one that is no spec is passed over.

    Note:
        Which of several statistics belong to levels or domains of one norm is known from its spec, from an affine that
        they share, or from a module that holds nothing but norms of equal size under names that are no numbers.
    """
    known = {path: spec for path, spec in ((path, _read_spec(spec)) for path, spec in (specs or {}).items()) if spec}
    fields, odd = _sort_fields(state)
    owners = _find_owners(fields, state, known)

    norms = [_read_norm(path, places, fields, known.get(path), odd) for path, places in owners.items()]
    return tuple(norms), odd


def _read_spec(fields: object) -> NormSpec | None:
    try:
        return NormSpec(**fields) if isinstance(fields, Mapping) else None
    except (ConfigError, TypeError):
        return None


# ---- which entries belong together


def _sort_fields(state: StateDict) -> tuple[dict[str, Fields], list[str]]:
    """Path -> vectors of a norm's state there, by field; and the names of statistics that are no vectors."""
    fields: dict[str, Fields] = {}
    odd: list[str] = []
    for key, value in state.items():
        path, _, field = key.rpartition(".")
        if field not in _FIELDS:
            continue
        is_number = not value.is_meta and value.layout is torch.strided and not value.is_quantized
        is_number = is_number and not value.is_complex() and value.dtype is not torch.bool
        shape_fits = value.numel() == 1 if field == POPULATION[2] else value.dim() == 1 and value.numel() > 0
        if is_number and shape_fits:
            fields.setdefault(path, {})[field] = value
        elif field in POPULATION:
            odd.append(key)
    return fields, odd


def _find_owners(
    fields: Mapping[str, Fields], state: StateDict, specs: Mapping[str, NormSpec]
) -> dict[str, dict[str, str]]:
    """Path of each norm -> level or domain -> the path where its state is; "" is what all share."""
    children = _list_children(state)
    owners: dict[str, dict[str, str]] = {}
    has_levels: dict[str, bool] = {}  # of a module with norms in it

    for path, held in fields.items():
        if "running_mean" not in held or "running_var" not in held:
            continue
        parent, _, name = path.rpartition(".")
        if parent not in has_levels:
            has_levels[parent] = _has_levels(parent, fields, children, specs)
        is_level = bool(path) and path not in specs and has_levels[parent]
        owners.setdefault(parent if is_level else path, {})[name if is_level else ""] = path

    for path, places in owners.items():
        shared = fields.get(path, {})
        parts = [
            name for name in children.get(path, ()) if _has_affine_alone(fields.get(_join(path, name), {}), shared)
        ]
        if "" in places and "weight" not in shared and len(parts) > 1:  # row 5: an affine for each level alone
            places.update({name: _join(path, name) for name in parts})
        places.setdefault("", path)
    return owners


def _list_children(state: StateDict) -> dict[str, dict[str, bool]]:
    """Path of each module -> the names in it, and whether each is a module."""
    children: dict[str, dict[str, bool]] = {}
    for key in state:
        path, is_module = key, False
        while path:
            path, _, name = path.rpartition(".")
            names = children.setdefault(path, {})
            if name in names:
                break
            names[name], is_module = is_module, True
    return children


def _has_levels(
    parent: str, fields: Mapping[str, Fields], children: Mapping[str, Mapping[str, bool]], specs: Mapping[str, NormSpec]
) -> bool:
    """Whether the norms in a module are the levels or domains of one, see `read_state_dict`."""
    if parent in specs:
        return True

    names = children.get(parent, {})
    sets = [fields.get(_join(parent, name), {}) for name, is_module in names.items() if is_module]
    sizes = {len(held["running_var"]) if "running_var" in held else 0 for held in sets}
    if len(sizes) != 1 or 0 in sizes:
        return False

    shared = fields.get(parent, {})
    if "weight" in shared and "running_var" not in shared:
        return len(shared["weight"]) in sizes
    is_alone = all(names.values()) and not any(name.isdecimal() for name in names)
    return bool(parent) and is_alone and len(sets) > 1


def _has_affine_alone(held: Fields, shared: Fields) -> bool:
    if set(held) != {"weight", "bias"} or "running_var" not in shared:
        return False
    return all(len(value) == len(shared["running_var"]) for value in held.values())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---- one norm


def _read_norm(
    path: str, places: Mapping[str, str], fields: Mapping[str, Fields], spec: NormSpec | None, odd: list[str]
) -> NormFacts:
    populations, affines = [], []
    for owner, place in places.items():
        held = fields.get(place, {})
        mean, var, counter = (held.get(name) for name in POPULATION)
        if mean is not None and var is not None:
            if len(mean) == len(var):
                populations.append(Population(owner, mean.double(), var.double(), _count(counter)))
            else:
                odd.append(_join(place, "running_var"))

        weight, bias = held.get("weight"), held.get("bias")
        if weight is not None or bias is not None:
            affines.append(Affine(owner, _widen(weight), _widen(bias), is_trained=True))

    size = len(populations[0].var) if populations else 0
    for affine_of in [one for one in affines if any(v is not None and len(v) != size for v in (one.weight, one.bias))]:
        affines.remove(affine_of)
        odd.append(_join(places[affine_of.owner], "weight"))

    record = _describe(path, size, populations, affines, spec)
    kind = "" if spec is None else f"{BatchNorm2d.__module__}.{BatchNorm2d.__qualname__}"
    return NormFacts(record, kind, is_training=False, populations=tuple(populations), affines=tuple(affines))


def _widen(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def _count(counter: Tensor | None) -> int | None:
    if counter is None or not bool(torch.isfinite(counter).all()):
        return None
    return int(counter)


def _describe(
    path: str, size: int, populations: list[Population], affines: list[Affine], spec: NormSpec | None
) -> NormRecord:
    """The answers of a norm as its spec gives them; else as its entries show, with torch's in training."""
    owners = [one.owner for one in populations] + [one.owner for one in affines]
    owners = [owner for owner in owners if owner]
    per = "shared" if not owners else "per_level"
    population = "shared" if any(not one.owner for one in populations) else per
    affine = "shared" if any(not one.owner for one in affines) else per
    if not affines:
        affine = "none"

    record = NormRecord(
        path=path,
        kind="norm of a file",
        num_features=size,
        statistics=per,
        population=population,
        affine=affine,
        inference="population",
        training="mini_batch",
        workers="one",
        group_size=None,
        batch_size=None,
        eps=_EPS,
        momentum=None,
        frozen="none",
        domains=tuple(dict.fromkeys(owners)),
        num_parameters=sum(len(value) for one in affines for value in (one.weight, one.bias) if value is not None),
    )
    if spec is None:
        return record

    is_frozen = spec.has_frozen_statistics or spec.training == "population"
    return dataclasses.replace(
        record,
        statistics="none" if is_frozen else spec.statistics,
        population=spec.population,
        affine=spec.affine,
        inference=spec.inference,
        training="population" if is_frozen else spec.training,
        workers=spec.workers,
        group_size=spec.normalization_batch_size,
        eps=spec.eps,
        momentum=spec.momentum if spec.average == "moving" else None,
        frozen=spec.frozen,
    )

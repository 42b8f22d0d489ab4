"""One layout of a norm's entries into another: read from any form into one record, written from it to any.

With a record in the middle, n forms need n readers and n writers. What a form cannot hold, or a
source does not know, is said in a `Note`. Which forms there are is in `bnext.layers.forms`; a norm's own load,
whoever calls it, is in `bnext.layers.loading`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnext.errors import CheckpointError, Refusal
from bnext.functional import Moments, merge_moments
from bnext.layers.norm_form import AFFINE, POPULATION, NormForm
from bnext.layers.sources import Origin, Source, find_origin, list_sources

__all__ = [
    "COPIED_POPULATION",
    "MERGED_POPULATION",
    "Fields",
    "NormRecord",
    "Note",
    "average_affines",
    "convert_state",
    "is_in_place_of_a_norm",
    "is_unit_affine",
    "merge_populations",
    "read_norm",
    "read_state",
    "write_state",
]

Fields = dict[str, Tensor]
StateDict = Mapping[str, Tensor]

NO_NORM = (
    "the checkpoint has a convolution in the place of the norm: its head is laid out otherwise (no norm, or another "
    "number of convolutions); the norm keeps its state, and convolutions of the same name may not be the same layer"
)
NUMBERED = "numbered levels were read in the order {names}"
MAPPED = "{target} was taken from {source}, as domain_map says"
UNIT_AFFINE = "the source has no affine, so weight 1 and bias 0 were set; outputs are unchanged"
DROPPED_OWNERS = "the source's state of {names} was left out: the target has no such level or domain"
DROPPED_AFFINE = "the affine was left out: the norm has none"
DROPPED_BIAS = "the bias was left out: the norm has none"
ZERO_BIAS = "the source has no bias, so 0 was set; outputs are unchanged"
DROPPED_POPULATION = "the population statistics were left out: the norm has none"
DROPPED_COUNTER = "num_batches_tracked was left out: the norm has none"
COPIED_POPULATION = (
    "the shared population statistics were copied to every level or domain; their own are unknown, re-estimate them "
    "with `bnext reestimate` or recompute_population_statistics"
)
MERGED_POPULATION = (
    "the population statistics of the levels or domains were merged into one with equal weights, which is right "
    "for none of them; load them into norms that have their own (in a config POPULATION of the norm's node of "
    "MODEL.BNEXT, 'per_level' or 'per_domain'), or re-estimate them "
    "(bnext reestimate, or recompute_population_statistics)"
)

UNKNOWN_KEY = Refusal(
    CheckpointError,
    "state of a batch norm",
    "be of torch's names, by level or domain or not",
    "Load a checkpoint of a model with such a batch norm there.",
)
OTHER_CHANNELS = Refusal(
    CheckpointError,
    "state of a batch norm",
    "have the shape [{num_features}]",
    "Load a checkpoint of a model with such a batch norm there.",
)
OTHER_NUMBER_OF_LEVELS = Refusal(
    CheckpointError,
    "numbered levels",
    "be as many as the {number} levels or domains of the model",
    "Set MODEL.RETINANET.IN_FEATURES as it was in training, or give a domain_map.",
)


class Note(NamedTuple):
    """One thing that was done to the state of a norm, and whether its outputs in evaluation mode stay the same."""

    text: str
    keeps_outputs: bool = True


@dataclasses.dataclass(frozen=True)
class NormRecord:
    """All that a norm knows, whatever its form.

    Args:
        affines, populations: owner -> fields under torch's names; "" owns what is shared.
        owners: names of what owns something, in order; numbers, if `is_numbered`.
        form: of the norm that it was read from; None: from a state dict, which does not say all of it.
    """

    affines: dict[str, Fields]
    populations: dict[str, Fields]
    owners: tuple[str, ...] = ()
    is_numbered: bool = False
    form: NormForm | None = None


def convert_state(
    state: StateDict, form: NormForm, path: str = "", domain_map: Mapping[str, str] | None = None
) -> tuple[Fields, list[Note]]:
    """The state of one norm, of any form, as a norm of another holds it; and what was done to get there.

    Args:
        state: by the keys within the norm.
        form: of the norm that will load it.
        path, domain_map: see `write_state`.

    Raises:
        CheckpointError: see `read_state` and `write_state`.
    """
    if is_in_place_of_a_norm(state):
        return {}, [Note(NO_NORM, keeps_outputs=False)]

    record = read_state(state, form.num_features, path)
    return write_state(record, form, path, domain_map)


def is_in_place_of_a_norm(state: StateDict) -> bool:
    """Whether state at a norm's path is that of a convolution."""
    return any(value.dim() > 1 for value in state.values())


# ---- reading


def read_norm(module: nn.Module, form: NormForm, path: str = "") -> NormRecord:
    """The record of a norm of a known form; its tensors are the norm's own."""
    keys = set(form.list_keys())
    state = {key: value for key, value in module.state_dict().items() if key in keys}

    record = read_state(state, form.num_features, path)
    return dataclasses.replace(record, owners=form.owners, form=form)


def read_state(state_dict: StateDict, num_features: int, path: str) -> NormRecord:
    """The record of a norm whose state dict is at hand, but not the norm.

    Raises:
        CheckpointError: keys that are not torch's names, by owner or not, or other channels.
    """
    by_owner: dict[str, Fields] = {}
    for key, value in state_dict.items():
        owner, _, field = key.rpartition(".")
        got = f"{key!r} {list(value.shape)}"
        if field not in AFFINE + POPULATION or "." in owner:
            raise UNKNOWN_KEY.of(got, path)
        if field != "num_batches_tracked" and tuple(value.shape) != (num_features,):
            raise OTHER_CHANNELS.of(got, path, num_features=num_features)
        by_owner.setdefault(owner, {})[field] = value.detach()

    owners = [name for name in by_owner if name]
    is_numbered = bool(owners) and set(owners) == {str(index) for index in range(len(owners))}
    if is_numbered:
        owners.sort(key=int)
    return NormRecord(_select(by_owner, AFFINE), _select(by_owner, POPULATION), tuple(owners), is_numbered)


def _select(by_owner: Mapping[str, Fields], names: tuple[str, ...]) -> dict[str, Fields]:
    """Some fields of every owner that has the first of them."""
    selected = {}
    for owner, fields in by_owner.items():
        if names[0] in fields:
            selected[owner] = {name: fields[name] for name in names if name in fields}
    return selected


# ---- writing


def write_state(
    record: NormRecord, form: NormForm, path: str = "", domain_map: Mapping[str, str] | None = None
) -> tuple[Fields, list[Note]]:
    """The state dict of a norm of another form, and what was done to get there.

    Args:
        record: what is known.
        form: of the norm that will hold it.
        path: of that norm, for errors.
        domain_map: name in `form` -> name in `record`, where they differ, of a level, a domain or a pair; "" is what
            is shared. See `restrict_map`.

    Raises:
        CheckpointError: numbered owners whose number is not the other side's.
    """
    notes: list[Note] = []
    for target, source in (domain_map or {}).items():
        notes.append(Note(MAPPED.format(target=target or "what is shared", source=source or "what is shared")))

    if not domain_map:
        domain_map = _match_numbers(record, form, path)
        names = domain_map.keys() if record.is_numbered else domain_map.values()
        notes += [Note(NUMBERED.format(names=", ".join(names)))] if names else []

    dropped = sorted(set(record.owners) - _find_used(record, form, domain_map))
    if dropped:
        text = DROPPED_OWNERS.format(names=", ".join(dropped))
        notes.append(Note(text, keeps_outputs=False))

    affine, affine_notes = _write_affine(record, domain_map, form)
    affine, bias_notes = _settle_bias(affine, form, is_known=record.form is not None)
    population, population_notes = _write_population(record, domain_map, form)
    return {**affine, **population}, [*notes, *affine_notes, *bias_notes, *population_notes]


def _find_used(record: NormRecord, form: NormForm, domain_map: Mapping[str, str]) -> set[str]:
    """The owners in a record that levels or domains of a form have something to do with."""
    used: set[str] = set()
    for half, answer in ((record.affines, form.affine), (record.populations, form.population)):
        owners = form.group_sources("shared" if answer == "none" else answer)
        for origin in itertools.chain.from_iterable(_find_origins(half, owners, domain_map).values()):
            used.update(origin.names)
    return used


def _find_origins(
    half: Mapping[str, Fields], owners: Mapping[str, list[Source]], domain_map: Mapping[str, str]
) -> dict[str, list[Origin]]:
    """Owner in one norm -> the origins of its sources in another; one for all sources has all, if it knows none."""
    origins = {}
    for owner, sources in owners.items():
        origins[owner] = [find_origin(source, half, domain_map) for source in sources]
        if not owner and not any(origin.names for origin in origins[owner]):
            origins[owner] = [Origin(list(half))]
    return origins


def _match_numbers(record: NormRecord, form: NormForm, path: str) -> dict[str, str]:
    """A domain map where one side has numbers for names, which count the names of the other in their order."""
    names, sources = form.levels or form.domains, record.owners
    if record.form is not None:
        sources = record.form.levels or record.form.domains
    if record.is_numbered == form.is_numbered or not record.owners or not names:
        return {}
    known = set(form.names)
    for source in list_sources(form.levels, form.domains):
        known.update(find_origin(source, record.owners, {}).names)
    if set(record.owners) <= known:  # by their names, or as pairs of them
        return {}

    if len(sources) != len(names):
        raise OTHER_NUMBER_OF_LEVELS.of(len(sources), path, number=len(names))
    return dict(zip(names, sources, strict=True))


def _write_affine(record: NormRecord, domain_map: Mapping[str, str], form: NormForm) -> tuple[Fields, list[Note]]:
    affines = record.affines

    if form.affine == "none":
        is_unit = all(is_unit_affine(fields) for fields in affines.values())
        return {}, [Note(DROPPED_AFFINE, keeps_outputs=is_unit)] if affines else []

    if not affines and record.form is not None:  # of a state dict it is not known whether it was left out
        unit = {"weight": torch.ones(form.num_features)}
        if form.has_bias:
            unit["bias"] = torch.zeros(form.num_features)
        return _flatten(dict.fromkeys(form.group_sources(form.affine), unit)), [Note(UNIT_AFFINE)]

    return _write_half(affines, form.group_sources(form.affine), domain_map, _AFFINE_RULES)


def _settle_bias(affine: Fields, form: NormForm, is_known: bool) -> tuple[Fields, list[Note]]:
    """An affine with a bias where the form has one, if it `is_known` that the source was without."""
    weights, biases = ({key for key in affine if key.rpartition(".")[2] == field} for field in AFFINE)

    if not form.has_bias:
        is_zero = not any(bool(affine[key].any()) for key in biases)
        kept = {key: affine[key] for key in weights}
        return kept, [Note(DROPPED_BIAS, keeps_outputs=is_zero)] if biases else []

    missing = {f"{key.removesuffix('weight')}bias": affine[key] for key in weights if is_known}
    missing = {key: torch.zeros_like(weight) for key, weight in missing.items() if key not in biases}
    return {**affine, **missing}, [Note(ZERO_BIAS)] if missing else []


def _write_population(record: NormRecord, domain_map: Mapping[str, str], form: NormForm) -> tuple[Fields, list[Note]]:
    populations = record.populations

    if form.population == "none":
        is_unused = record.form is not None and record.form.inference[0] != "population"
        return {}, [Note(DROPPED_POPULATION, keeps_outputs=is_unused)] if populations else []

    state, notes = _write_half(populations, form.group_sources(form.population), domain_map, _POPULATION_RULES)
    if form.inference[0] != "population":
        notes = [note._replace(keeps_outputs=True) for note in notes]

    counters = [key for key in state if key.endswith("num_batches_tracked")]
    if counters and not form.has_counter:
        state = {key: value for key, value in state.items() if key not in counters}
        notes.append(Note(DROPPED_COUNTER))
    return state, notes


def _write_half(
    half: dict[str, Fields], owners: Mapping[str, list[Source]], domain_map: Mapping[str, str], rules: _Rules
) -> tuple[Fields, list[Note]]:
    """The affines, or the populations, of all owners, each from those of its sources.

    What all share stands in for an owner only where no owner has its own, or domain_map says so.
    """
    origins = _find_origins(half, owners, domain_map)
    every_origin = itertools.chain.from_iterable(origins.values())
    has_own = any(not origin.is_shared and origin.names for origin in every_origin)

    by_owner: dict[str, Fields] = {}
    notes: set[Note] = set()
    missing = []
    for owner, of_owner in origins.items():
        names = list(dict.fromkeys(itertools.chain.from_iterable(origin.names for origin in of_owner)))
        is_stand_in = bool(owner) and names == [""]
        if not names or (is_stand_in and has_own and domain_map.get(owner) != ""):
            missing.append(owner or "it")
            continue

        fields = [half[name] for name in names]
        are_equal = all(_are_equal(one, fields[0]) for one in fields[1:])
        by_owner[owner] = fields[0] if are_equal else rules.merge(fields)
        if len(fields) > 1:
            notes.add(Note(rules.equal) if are_equal else Note(rules.merged, keeps_outputs=False))
        if owner and any(origin.is_shared for origin in of_owner):
            notes.add(Note(rules.copied))

    if missing:
        notes.add(Note(rules.missing.format(names=", ".join(missing)), keeps_outputs=False))
    return _flatten(by_owner), sorted(notes)


def _flatten(by_owner: Mapping[str, Fields]) -> Fields:
    """Keys of a state dict; no two share memory."""
    state = {}
    for owner, fields in by_owner.items():
        for field, value in fields.items():
            state[f"{owner}.{field}" if owner else field] = value.clone()
    return state


def _are_equal(one: Fields, other: Fields) -> bool:
    if one.keys() != other.keys() or not (_have_values(one) and _have_values(other)):
        return False
    return all(torch.equal(value, other[field]) for field, value in one.items())


def is_unit_affine(affine: Fields) -> bool:
    """Whether every weight is 1 and every bias 0."""
    if not _have_values(affine):
        return False
    return all(bool((values == float(field == "weight")).all()) for field, values in affine.items())


def _have_values(fields: Fields) -> bool:
    """Whether tensors have values: on the meta device they have shapes alone."""
    return not any(value.is_meta for value in fields.values())


# ---- merging what several own


def average_affines(affines: Sequence[Mapping[str, Tensor]]) -> Fields:
    """The mean of affines, field by field."""
    return {field: torch.stack([affine[field] for affine in affines]).mean(0) for field in affines[0]}


def merge_populations(populations: Sequence[Mapping[str, Tensor]], weights: Sequence[float] = ()) -> Fields:
    """One set of running statistics for the union of populations; in float64, and in the type that they came in.

    Args:
        populations: running_mean and running_var [C] of each, and num_batches_tracked, of which the largest is taken.
        weights: above 0, how much of the union each is; none: all alike.
    """
    mean = torch.stack([fields["running_mean"] for fields in populations])
    var = torch.stack([fields["running_var"] for fields in populations])
    shares = torch.tensor(list(weights) or [1.0] * len(populations), dtype=torch.float64, device=mean.device)
    counts = shares * (len(populations) / shares.sum())  # which Moments take for numbers of elements
    merged = merge_moments(Moments(counts, mean.double(), var.double()))

    state = {"running_mean": merged.mean.to(mean.dtype), "running_var": merged.var.to(var.dtype)}
    counters = [fields["num_batches_tracked"] for fields in populations if "num_batches_tracked" in fields]
    if counters:
        state["num_batches_tracked"] = torch.stack(counters).amax(0)
    return state


@dataclasses.dataclass(frozen=True)
class _Rules:
    """One half of a norm's state, its affine or its population: how several become one, and what is said."""

    merge: Callable[[list[Fields]], Fields]
    copied: str
    equal: str
    merged: str
    missing: str


_AFFINE_RULES = _Rules(
    average_affines,
    copied="the shared affine was copied to every level or domain; outputs are unchanged",
    equal="the affines of the levels or domains are equal and became one; outputs are unchanged",
    merged="the affines of the levels or domains were averaged into one; outputs change, fine-tune before use",
    missing="the source holds no affine for {names}; the initial one is kept",
)
_POPULATION_RULES = _Rules(
    merge_populations,
    copied=COPIED_POPULATION,
    equal="the population statistics of the levels or domains are equal and became one; outputs are unchanged",
    merged=MERGED_POPULATION,
    missing="the source holds no population statistics for {names}; re-estimate them",
)

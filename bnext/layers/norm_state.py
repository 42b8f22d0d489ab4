"""One record of what a norm knows, between all forms: read from any, written to any.

With a record in the middle, n forms need n readers and n writers. What a form cannot hold, or a
source does not know, is said in a `Note`. Which forms there are is in `bnext.layers.forms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnext.errors import CheckpointError, ConfigError
from bnext.functional import Moments, merge_moments
from bnext.layers.forms import AFFINE, POPULATION, NormForm

__all__ = ["Fields", "NormRecord", "Note", "read_norm", "read_state", "write_state"]

Fields = dict[str, Tensor]
StateDict = Mapping[str, Tensor]

EXACT_AFFINE = "the shared affine was copied to every {one}; outputs are unchanged"
EQUAL_AFFINES = "the affines of the {sources} are equal and became one; outputs are unchanged"
AVERAGED_AFFINE = "the affines of the {sources} were averaged into one; outputs change, fine-tune before use"
COPIED_POPULATION = (
    "the shared population statistics were copied to every {one}; the {sources}' own are unknown, "
    "re-estimate them with recompute_population_statistics"
)
EQUAL_POPULATIONS = "the population statistics of the {sources} are equal and became one; outputs are unchanged"
MERGED_POPULATION = (
    "the population statistics of the {sources} were merged into one with equal weights; their element "
    "counts are unknown, re-estimate them with recompute_population_statistics"
)
NUMBERED = "numbered {sources} were read in the order {names}"
MAPPED = "{target} was taken from {source}, as domain_map says"
NO_POPULATION = "the source holds no population statistics for {names}; re-estimate them"
NO_AFFINE = "the source holds no affine for {names}; the initial one is kept"
UNIT_AFFINE = "the source has no affine, so weight 1 and bias 0 were set; outputs are unchanged"
DROPPED_OWNERS = "the source's state of {names} was left out: the target has no such {one}"
DROPPED_AFFINE = "the affine was left out: the norm has none"
DROPPED_POPULATION = "the population statistics were left out: the norm has none"
DROPPED_COUNTER = "num_batches_tracked was left out: the norm has none"


class Note(NamedTuple):
    """What was done to the state of one norm, and whether its outputs in evaluation mode stay what they were."""

    text: str
    keeps_outputs: bool = True


@dataclasses.dataclass(frozen=True)
class NormRecord:
    """What a norm knows, whatever its form.

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


def read_norm(module: nn.Module, form: NormForm, path: str = "") -> NormRecord:
    """The record of a norm of a known form; its tensors are the norm's own."""
    keys = set(form.list_keys())
    state = {key: value for key, value in module.state_dict().items() if key in keys}
    record = read_state(state, form.num_features, path)
    return dataclasses.replace(record, owners=form.owners, is_numbered=form.is_numbered, form=form)


def read_state(found: StateDict, num_features: int, path: str) -> NormRecord:
    """The record of a norm whose state dict is at hand, but not the norm.

    Raises:
        CheckpointError: keys that are not torch's names, by owner or not, or other channels.
    """
    owners: dict[str, Fields] = {}
    for key, value in found.items():
        owner, _, field = key.rpartition(".")
        if field not in AFFINE + POPULATION or owner.count("."):
            raise CheckpointError(
                f"state of a batch norm must be of torch's names, by level or domain or not; got {key!r} ({path}). "
                f"Load a checkpoint of a model with batch norm there."
            )
        if field != "num_batches_tracked" and tuple(value.shape) != (num_features,):
            raise CheckpointError(
                f"state of a batch norm must have the shape [{num_features}]; got {list(value.shape)} "
                f"({path}, {key!r}). Load a checkpoint of a model with batch norm there and as many channels."
            )
        owners.setdefault(owner, {})[field] = value.detach()
    names = tuple(name for name in owners if name)
    is_numbered = bool(names) and set(names) == {str(index) for index in range(len(names))}
    names = tuple(sorted(names, key=int)) if is_numbered else names
    return NormRecord(_select(owners, AFFINE), _select(owners, POPULATION), names, is_numbered)


def write_state(
    record: NormRecord, form: NormForm, path: str = "", domain_map: Mapping[str, str] | None = None
) -> tuple[Fields, list[Note]]:
    """The state dict of a norm of another form, and what was done to get there.

    Args:
        record: what is known.
        form: of the norm that will hold it.
        path: of that norm, for errors.
        domain_map: name in `form` -> name in `record`, where they differ; "" is what is shared.

    Raises:
        CheckpointError: numbered owners whose number is not the other side's.
        ConfigError: domain_map names something that is on neither side.
    """
    named, notes = _match_numbers(record, form, path, domain_map)
    owners, domain_map = _rename(named, form, domain_map or {}, path)
    notes += [
        Note(MAPPED.format(target=target or "what is shared", source=source or "what is shared"))
        for target, source in domain_map.items()
    ]
    kept = {*form.owners, *domain_map.values()}
    dropped = [name for name in named.owners if name not in kept] if form.owners or domain_map else []
    if dropped:
        text = DROPPED_OWNERS.format(names=", ".join(sorted(dropped)), one=form.sources[:-1])
        notes.append(Note(text, keeps_outputs=False))
    affine, affine_notes = _write_affine(named, owners, form)
    population, population_notes = _write_population(named, owners, form)
    return {**affine, **population}, [*notes, *affine_notes, *population_notes]


def _select(owners: Mapping[str, Fields], fields: tuple[str, ...]) -> dict[str, Fields]:
    """Some fields of every owner that has the first of them."""
    held = {owner: {field: values[field] for field in fields if field in values} for owner, values in owners.items()}
    return {owner: values for owner, values in held.items() if fields[0] in values}


def _match_numbers(
    record: NormRecord, form: NormForm, path: str, domain_map: Mapping[str, str] | None
) -> tuple[NormRecord, list[Note]]:
    """Numbers on one side get the names of the other, in order."""
    if domain_map or record.is_numbered == form.is_numbered or not record.owners or not form.owners:
        return record, []
    if record.is_numbered and set(record.owners) <= set(form.owners):
        return record, []
    if len(record.owners) != len(form.owners):
        raise CheckpointError(
            f"numbered {form.sources} must be as many as the {len(form.owners)} {form.sources} of the model; got "
            f"{len(record.owners)} ({path}). Set MODEL.RETINANET.IN_FEATURES as it was in training, or name with "
            f"domain_map which becomes which."
        )
    names = dict(zip(record.owners, form.owners, strict=True))
    affines, populations = (
        {names.get(owner, owner): fields for owner, fields in held.items()}
        for held in (record.affines, record.populations)
    )
    order = form.owners if record.is_numbered else record.owners
    renamed = dataclasses.replace(record, affines=affines, populations=populations, owners=form.owners)
    sources = form.sources if record.is_numbered else "places"
    return renamed, [Note(NUMBERED.format(sources=sources, names=", ".join(order)))]


def _rename(
    record: NormRecord, form: NormForm, domain_map: Mapping[str, str], path: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Owner in `form` -> owner in the record; and the part of `domain_map` that concerns this norm."""
    known = {"", *record.owners, *record.affines, *record.populations}
    for target, source in domain_map.items():
        if source not in known or (target and target not in form.owners):
            raise ConfigError(
                f"domain_map must map names of the target, {('', *form.owners)!r}, to names of the source, "
                f"{tuple(sorted(known))!r}; got {target!r}: {source!r} ({path or 'copy_norm_state'}). Correct the name."
            )
    return {owner: domain_map.get(owner, owner) for owner in ("", *form.owners)}, dict(domain_map)


def _write_affine(record: NormRecord, owners: Mapping[str, str], form: NormForm) -> tuple[Fields, list[Note]]:
    held = record.affines
    if form.affine == "none":
        return {}, [Note(DROPPED_AFFINE, keeps_outputs=_are_units(held.values()))] if held else []
    if not held and record.form is not None:
        slots = [""] if form.affine == "shared" else form.owners
        unit = {"weight": torch.ones(form.num_features), "bias": torch.zeros(form.num_features)}
        return _flatten(dict.fromkeys(slots, unit)), [Note(UNIT_AFFINE)]
    texts = (EXACT_AFFINE, EQUAL_AFFINES, AVERAGED_AFFINE, NO_AFFINE)
    return _spread(held, owners, form, form.affine, _average_affines, texts)


def _write_population(record: NormRecord, owners: Mapping[str, str], form: NormForm) -> tuple[Fields, list[Note]]:
    held = record.populations
    if form.population == "none":
        return {}, [Note(DROPPED_POPULATION, keeps_outputs=not _uses_population(record.form))] if held else []
    texts = (COPIED_POPULATION, EQUAL_POPULATIONS, MERGED_POPULATION, NO_POPULATION)
    state, notes = _spread(held, owners, form, form.population, _merge_populations, texts)
    if not _uses_population(form):
        notes = [note._replace(keeps_outputs=True) for note in notes]
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    if counters and not form.has_counter:
        state = {key: value for key, value in state.items() if key not in counters}
        notes.append(Note(DROPPED_COUNTER))
    return state, notes


def _uses_population(form: NormForm | None) -> bool:
    return form is None or form.inference[0] == "population"


def _spread(
    held: dict[str, Fields],
    owners: Mapping[str, str],
    form: NormForm,
    layout: str,
    join: Callable[[list[Fields]], Fields],
    texts: tuple[str, str, str, str],
) -> tuple[Fields, list[Note]]:
    """Some fields of a norm's state, given to what is shared or to every owner."""
    copied, equal, joined, unknown = (text.replace("{one}", form.sources[:-1]) for text in texts)
    copied, equal, joined = (text.replace("{sources}", form.sources) for text in (copied, equal, joined))
    if layout == "shared":
        whole = held.get(owners[""], held.get(""))
        if whole is not None:
            return dict(whole), []
        own = [fields for owner, fields in held.items() if not form.owners or owner in owners.values()]
        if not own:
            return {}, [Note(unknown.format(names=f"any {form.sources[:-1]}" if form.owners else "it"), False)]
        if all(_are_equal(fields, own[0]) for fields in own):
            return dict(own[0]), [Note(equal)] if len(held) > 1 else []
        return join(own), [Note(joined, keeps_outputs=False)]
    own_fields = {owner: held[owners[owner]] for owner in form.owners if owners[owner] in held and owners[owner]}
    shared = {owner: held[""] for owner in form.owners if "" in held and (not own_fields or not owners[owner])}
    missing = [owner for owner in form.owners if owner not in own_fields and owner not in shared]
    notes = [Note(copied)] if shared else []
    notes += [Note(unknown.format(names=", ".join(missing)), keeps_outputs=False)] if missing else []
    return _flatten({**own_fields, **shared}), notes


def _flatten(by_owner: Mapping[str, Fields]) -> Fields:
    """Keys of a state dict; no two share memory."""
    return {
        f"{owner}.{field}" if owner else field: value.clone()
        for owner, fields in by_owner.items()
        for field, value in fields.items()
    }


def _are_equal(one: Fields, other: Fields) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[field]) for field, value in one.items())


def _are_units(affines: Iterable[Fields]) -> bool:
    return all(
        bool((values == float(field == "weight")).all()) for fields in affines for field, values in fields.items()
    )


def _average_affines(states: list[Fields]) -> Fields:
    return {field: torch.stack([state[field] for state in states]).mean(0) for field in states[0]}


def _merge_populations(states: list[Fields]) -> Fields:
    """In float64, and in the type that they came in."""
    mean = torch.stack([state["running_mean"] for state in states])
    var = torch.stack([state["running_var"] for state in states])
    merged = merge_moments(Moments(mean.new_ones(len(states), dtype=torch.float64), mean.double(), var.double()))
    tracked = [state["num_batches_tracked"] for state in states if "num_batches_tracked" in state]
    counter = {"num_batches_tracked": torch.stack(tracked).amax(0)} if tracked else {}
    return {"running_mean": merged.mean.to(mean.dtype), "running_var": merged.var.to(var.dtype), **counter}

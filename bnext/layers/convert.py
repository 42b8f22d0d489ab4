"""Carry the state of a norm from one form to another, and say what was known and what was not.

Forms that are read: one torch BN / SyncBN shared by all levels (rows 1 and 3 of Table 5), an affine
with statistics per level (rows 2 and 4), an affine per level (rows 5 and 6), and detectron2's
`CycleBatchNormList`, which numbers its levels in the order of the head's input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bnext.errors import CheckpointError, ConfigError
from bnext.functional import Moments, merge_moments
from bnext.layers.level_norm import LevelBatchNorm2d

__all__ = ["Change", "ConversionReport", "convert_norm", "convert_norm_state", "copy_norm_state"]

AFFINE = ("weight", "bias")
POPULATION = ("running_mean", "running_var", "num_batches_tracked")
StateDict = Mapping[str, Tensor]

EXACT_AFFINE = "the shared affine was copied to every level; outputs are unchanged"
AVERAGED_AFFINE = "the affines of the levels were averaged into one; outputs change, fine-tune before use"
COPIED_POPULATION = (
    "the shared population statistics were copied to every level; the levels' own are not in the "
    "checkpoint, re-estimate them with recompute_population_statistics"
)
MERGED_POPULATION = (
    "the population statistics of the levels were merged into one with equal weights; their element "
    "counts are not in the checkpoint, re-estimate them with recompute_population_statistics"
)
NUMBERED_LEVELS = "numbered levels were read in the order {levels}"
NO_POPULATION = "the checkpoint holds no population statistics for {levels}; re-estimate them"
DROPPED_LEVELS = "the checkpoint's state of {levels} was left out: the model has no such level"
NO_NORM = (
    "the checkpoint has a convolution in the place of the norm: its head is laid out otherwise (no norm, or another "
    "number of convolutions); the norm keeps its state, and convolutions of the same name may not be the same layer"
)
NO_AFFINE = "the checkpoint holds no affine for {levels}; the initial one is kept"


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that was done to the state of one norm: its path in the model, and what."""

    path: str
    text: str


@dataclasses.dataclass
class ConversionReport:
    """What a conversion did, norm by norm. `str(report)` is the text to log."""

    changes: list[Change] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        paths: dict[str, list[str]] = {}
        for change in self.changes:
            paths.setdefault(change.text, []).append(change.path)
        lines = [f"  {len(where)} norms ({where[0]}, ...): {text}" for text, where in paths.items()]
        return "\n".join(["Norm state of the checkpoint:", *lines]) if lines else "Norm state needed no conversion."


def convert_norm_state(state_dict: StateDict, model: nn.Module) -> tuple[dict[str, Tensor], ConversionReport]:
    """A state dict in the form that the norms of a model expect.

    Args:
        state_dict: of any form that the module docstring lists; it is not changed.
        model: the model that will load it, with `LevelBatchNorm2d` layers of any spec.

    Returns:
        A new state dict, and the report of what was converted.

    Raises:
        CheckpointError: numbered levels whose number is not the model's, or state of no known form
            or of other channels.
    """
    converted, report = dict(state_dict), ConversionReport()
    for path, layer in model.named_modules():
        if not isinstance(layer, LevelBatchNorm2d):
            continue
        prefix = f"{path}." if path else ""
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not found or found.keys() == layer.state_dict().keys():
            continue
        for key in found:
            del converted[prefix + key]
        if any(value.dim() > 1 for value in found.values()):
            report.changes.append(Change(path, NO_NORM))
            continue
        state, texts = _convert(found, layer, path)
        converted.update({prefix + key: value for key, value in state.items()})
        report.changes += [Change(path, text) for text in texts]
    return converted, report


def copy_norm_state(source: nn.Module, target: LevelBatchNorm2d, path: str = "") -> ConversionReport:
    """Copy the affine and the statistics of one norm into another of any form.

    Args:
        source: torch BN or SyncBN, `CycleBatchNormList`, or `LevelBatchNorm2d`; not changed.
        target: receives the state; what the source does not know keeps its value.
        path: name of the norm, for the report.
    """
    state, report = convert_norm_state(source.state_dict(), target)
    target.load_state_dict(state, strict=False)
    report.changes = [Change(path or change.path, change.text) for change in report.changes]
    return report


def convert_norm(model: nn.Module, **changes: object) -> ConversionReport:
    """Give every level norm of a model other answers, and carry its state over. In place.

    Args:
        changes: fields of `NormSpec`, for example population="per_level".

    Returns:
        What could be carried over and what could not.

    Raises:
        ConfigError: an answer is not allowed, or the model is itself a norm.

    Note:
        The parameters are new ones: build the optimizer afterwards. Hooks on the norms are not kept.
    """
    if isinstance(model, LevelBatchNorm2d):
        raise ConfigError(
            "model must hold its norms in modules; got a LevelBatchNorm2d itself (convert_norm). "
            "Make the new norm and call copy_norm_state(old, new)."
        )
    if not any(isinstance(module, LevelBatchNorm2d) for module in model.modules()):
        raise ConfigError(
            f"model must have a level norm to convert; got {type(model).__name__} without one (convert_norm). "
            f"Build it with a head of bnext (MODEL.META_ARCHITECTURE BNextRetinaNet) and load the checkpoint into it."
        )
    report = ConversionReport()
    converted: dict[nn.Module, LevelBatchNorm2d] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):  # a norm at two places stays one
        if not isinstance(layer, LevelBatchNorm2d):
            continue
        if layer not in converted:
            converted[layer] = _make_like(layer, changes)
            report.changes += copy_norm_state(layer, converted[layer], path).changes
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, converted[layer])
    return report


def _make_like(layer: LevelBatchNorm2d, changes: dict[str, object]) -> LevelBatchNorm2d:
    """A new norm with some answers changed; device, type, mode and freezing are those of `layer`."""
    made = LevelBatchNorm2d(layer.num_features, layer.levels, layer.spec.replace(**changes))
    first = next(value for value in layer.state_dict().values() if value.is_floating_point())
    made.to(first.device, first.dtype).train(layer.training)
    made.requires_grad_(any(parameter.requires_grad for parameter in layer.parameters()))
    made.path = layer.path
    return made


def _convert(found: StateDict, layer: LevelBatchNorm2d, path: str) -> tuple[dict[str, Tensor], list[str]]:
    """Keys and values relative to one layer, in the layer's form; and what was done."""
    _check_shapes(found, layer.num_features, path)
    by_level, texts = _name_levels(found, layer.levels, path)
    dropped = sorted(by_level.keys() - {"", *layer.levels})
    if dropped:
        texts = [*texts, DROPPED_LEVELS.format(levels=", ".join(dropped))]
    affine, affine_texts = _spread(
        by_level, layer.levels, AFFINE, layer.spec.affine, _average_affines, EXACT_AFFINE, AVERAGED_AFFINE, NO_AFFINE
    )
    population, population_texts = _spread(
        by_level,
        layer.levels,
        POPULATION,
        layer.spec.population,
        _merge_populations,
        COPIED_POPULATION,
        MERGED_POPULATION,
        NO_POPULATION,
    )
    return {**affine, **population}, [*texts, *affine_texts, *population_texts]


def _check_shapes(found: StateDict, num_features: int, path: str) -> None:
    for key, value in found.items():
        if key.rpartition(".")[2] != "num_batches_tracked" and tuple(value.shape) != (num_features,):
            raise CheckpointError(
                f"state of a batch norm must have the shape [{num_features}]; got {list(value.shape)} "
                f"({path}, {key!r}). Load a checkpoint of a head with batch norm and as many channels."
            )


def _name_levels(
    found: StateDict, levels: tuple[str, ...], path: str
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Sort keys by owner: "" for what all levels share, else the level; numbers become names."""
    owners: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        owner, _, field = key.rpartition(".")
        if field not in AFFINE + POPULATION or owner.count("."):
            raise CheckpointError(
                f"state of a batch norm must be of torch's names, by level or not; got {key!r} ({path}). "
                f"Load a checkpoint of a head with batch norm."
            )
        owners.setdefault(owner, {})[field] = value
    numbers = sorted(owner for owner in owners if owner.isdigit())
    if not numbers:
        return owners, []
    if numbers != [str(i) for i in range(len(levels))]:
        raise CheckpointError(
            f"numbered levels must be as many as the {len(levels)} levels of the model; got {len(numbers)} ({path}). "
            f"Set MODEL.RETINANET.IN_FEATURES as it was in training."
        )
    named = {levels[int(owner)] if owner.isdigit() else owner: fields for owner, fields in owners.items()}
    return named, [NUMBERED_LEVELS.format(levels=", ".join(levels))]


def _spread(
    by_owner: dict[str, dict[str, Tensor]],
    levels: tuple[str, ...],
    fields: tuple[str, ...],
    sharing: str,
    join: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
    copied: str,
    joined: str,
    unknown: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Some fields of a norm's state, given to one owner or to every level."""
    held = {owner: {field: values[field] for field in fields if field in values} for owner, values in by_owner.items()}
    held = {owner: values for owner, values in held.items() if fields[0] in values}
    own = {level: held[level] for level in levels if level in held}
    if sharing == "shared":
        if "" in held:
            return dict(held[""]), []
        return (join(list(own.values())), [joined]) if own else ({}, [unknown.format(levels="any level")])
    if "" in held and not own:
        return {f"{level}.{field}": value.clone() for level in levels for field, value in held[""].items()}, [copied]
    missing = [level for level in levels if level not in own]
    state = {f"{level}.{field}": value for level, values in own.items() for field, value in values.items()}
    return state, [unknown.format(levels=", ".join(missing))] if missing else []


def _average_affines(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {field: torch.stack([state[field] for state in states]).mean(0) for field in AFFINE}


def _merge_populations(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    mean = torch.stack([state["running_mean"] for state in states])
    var = torch.stack([state["running_var"] for state in states])
    merged = merge_moments(Moments(mean.new_ones(len(states)), mean, var))
    tracked = [state["num_batches_tracked"] for state in states if "num_batches_tracked" in state]
    counter = {"num_batches_tracked": torch.stack(tracked).amax(0)} if tracked else {}
    return {"running_mean": merged.mean, "running_var": merged.var, **counter}

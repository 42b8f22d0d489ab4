"""Facts of the norms of a torch model that is not run."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnext.diagnostics.collecting.layers_before import find_layers_before
from bnext.diagnostics.facts import Affine, NormFacts, Population
from bnext.diagnostics.inventory import NormRecord, Samples, find_norm_records
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.deal import StatisticsDeal
from bnext.layers.folded_norm import FoldedNorm
from bnext.layers.forms import AFFINE, POPULATION, find_kind

__all__ = ["find_folded", "read_norms"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Shuffles = dict[nn.Module, tuple[str, int | None]]


def read_norms(model: nn.Module, num_samples: Samples = None, *, with_layers: bool = True) -> tuple[NormFacts, ...]:
    """The norms of a model, with copies of their state.

    Args:
        model: any module.
        num_samples: see `find_norm_records`.
        with_layers: whether the layers before them are looked for, which takes the most time.

    Note:
        Nothing is run, though forwards may be traced (see `find_layers_before`), and nothing is changed.
        Of a model on the meta device there are no statistics.
    """
    records = find_norm_records(model, num_samples)
    norms = {record.path: model.get_submodule(record.path) for record in records}
    trained = _find_trained_before(model, {record.path for record in records})
    shuffles = _find_shuffles(model)
    layers = find_layers_before(model, norms) if with_layers else {}
    facts = []
    for record in records:
        norm = _read(model, record, trained.get(record.path), shuffles)
        facts.append(dataclasses.replace(norm, layer_before=layers.get(record.path)))
    return tuple(facts)


def find_folded(model: nn.Module, before: nn.Module | None = None) -> tuple[str, ...]:
    """Paths of modules that do nothing in the place of a norm.

    Args:
        model: any module; folded norms of bnext are found in it.
        before: the model before its norms were changed; where it has a norm and `model` an identity, that is one, too.
    """
    norms = set() if before is None else {record.path for record in find_norm_records(before)}
    folded = []

    for path, module in model.named_modules():
        if isinstance(module, FoldedNorm) or (path in norms and isinstance(module, nn.Identity)):
            folded.append(path)
    return tuple(folded)


def _find_trained_before(model: nn.Module, norms: set[str]) -> dict[str, bool | None]:
    """Path of a norm -> whether the last layer with weights before it takes gradients."""
    trained: dict[str, bool | None] = {}
    last, inside = None, None  # of which the parts follow it directly

    for path, module in model.named_modules():
        if inside is not None and (not inside or path.startswith(f"{inside}.")):
            continue
        if path in norms:
            inside, trained[path] = path, last
            continue
        parameters = list(module.parameters(recurse=False))
        if parameters:
            last = any(parameter.requires_grad for parameter in parameters)
    return trained


def _read(model: nn.Module, record: NormRecord, is_after_trained: bool | None, shuffles: Shuffles) -> NormFacts:
    norm = model.get_submodule(record.path)
    shuffle, num_groups = shuffles.get(norm, ("", None))
    kind = type(norm)
    populations, affines = [], []

    for owner, part in norm.named_modules():
        own: Any = part
        mean, var = _copy(getattr(own, "running_mean", None)), _copy(getattr(own, "running_var", None))
        if mean is not None and var is not None:
            populations.append(Population(owner, mean, var, _count_updates(own)))

        weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
        tensors = [value for value in (weight, bias) if _is_vector(value)]
        if tensors:
            is_trained = any(isinstance(value, nn.Parameter) and value.requires_grad for value in tensors)
            affines.append(Affine(owner, _copy(weight), _copy(bias), is_trained))

    return NormFacts(
        record=record,
        type_name=f"{kind.__module__}.{kind.__qualname__}",
        is_training=norm.training,
        reason=_explain(model, norm, record),
        populations=tuple(populations),
        affines=tuple(affines),
        shuffle=shuffle,
        num_groups=num_groups,
        single_element=norm.spec.single_element if isinstance(norm, BatchNorm2d) else "error",
        is_after_trained=is_after_trained,
        has_own_forward=record.statistics != "sample" and find_kind(norm) is None,
        extras=_list_extras(norm),
        dtype=_find_dtype(norm),
    )


def _find_shuffles(model: nn.Module) -> Shuffles:
    """The modules whose samples are dealt out at random: how, and to how many groups."""
    shuffles: Shuffles = {}
    for module in model.modules():
        owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
        deal = next((owner for owner in owners if isinstance(owner, StatisticsDeal)), None)

        if deal is not None:
            shuffles.update(dict.fromkeys(module.modules(), ("statistics", deal.num_groups)))
        elif getattr(module, "shares_samples", False):  # see `shares_work`
            shuffles.update(dict.fromkeys(module.modules(), ("features", None)))
    return shuffles


def _list_extras(norm: nn.Module) -> tuple[str, ...]:
    """State and hooks that a conversion which knows a norm's state alone would lose."""
    if isinstance(norm, BatchNorm2d) or not isinstance(norm, _BatchNorm):
        return ()

    state = [name for name, _ in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))]
    names = [name for name in state if name not in (*AFFINE, *POPULATION)]
    names += [name for name, child in norm.named_children() if not isinstance(child, nn.Identity)]
    return (*names, "hooks") if any(getattr(norm, hooks, None) for hooks in _HOOKS) else tuple(names)


def _find_dtype(norm: nn.Module) -> str:
    values = [value for value in (*norm.buffers(), *norm.parameters()) if value.is_floating_point()]
    return str(values[0].dtype).removeprefix("torch.") if values else ""


def _copy(value: object) -> Tensor | None:
    return value.detach().double().cpu().clone() if _is_vector(value) and not value.is_meta else None


def _is_vector(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor with one number for each channel."""
    return isinstance(value, Tensor) and not is_lazy(value) and value.dim() == 1


def _count_updates(norm: Any) -> int | None:
    counter = getattr(norm, "num_batches_tracked", None)
    return None if not isinstance(counter, Tensor) or counter.is_meta else int(counter)


def _explain(model: nn.Module, norm: nn.Module, record: NormRecord) -> str:
    """Why a norm is frozen, or in another mode than its model."""
    if model.training and not norm.training:
        return "in evaluation mode within a model in training mode"
    if norm.training and not model.training:
        return "in training mode within a model in evaluation mode"
    if record.frozen in ("statistics", "both"):
        return f"frozen: {record.kind}"
    if record.frozen == "affine":
        return "its affine takes no gradients"
    return ""

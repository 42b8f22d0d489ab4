"""What a torch model says of its norms without being run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnext.diagnostics.facts import Affine, LayerFacts, NormFacts, Population
from bnext.diagnostics.inventory import NormRecord, Samples, find_norm_records
from bnext.diagnostics.layers_before import find_layers_before

__all__ = ["read_norms"]


def read_norms(model: nn.Module, num_samples: Samples = None) -> tuple[NormFacts, ...]:
    """The norms of a model, with copies of their state.

    Args:
        model: any module.
        num_samples: see `find_norm_records`.

    Note:
        Nothing is run, though forwards may be traced (see `find_layers_before`), and nothing is changed.
        Of a model on the meta device there are no statistics.
    """
    records = find_norm_records(model, num_samples)
    norms = {record.path: model.get_submodule(record.path) for record in records}
    layers = find_layers_before(model, norms)
    return tuple(_read(model, norms[record.path], record, layers.get(record.path)) for record in records)


def _read(model: nn.Module, norm: nn.Module, record: NormRecord, layer_before: LayerFacts | None) -> NormFacts:
    kind = type(norm)
    populations, affines = [], []

    for owner, part in norm.named_modules():
        own: Any = part
        mean, var = _copy(getattr(own, "running_mean", None)), _copy(getattr(own, "running_var", None))
        if mean is not None and var is not None:
            populations.append(Population(owner, mean, var, _count_updates(own)))

        weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
        tensors = [value for value in (weight, bias) if isinstance(value, Tensor) and value.dim() == 1]
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
        layer_before=layer_before,
    )


def _copy(value: object) -> Tensor | None:
    if not isinstance(value, Tensor) or is_lazy(value) or value.is_meta or value.dim() != 1:
        return None
    return value.detach().double().cpu().clone()


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

"""What a torch model says of its norms without being run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnext.diagnostics.facts import Affine, NormFacts, Population
from bnext.diagnostics.inventory import NormRecord, Samples, find_norm_records
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.deal import StatisticsDeal

__all__ = ["read_norms"]

Shuffles = dict[nn.Module, tuple[str, int | None]]


def read_norms(model: nn.Module, num_samples: Samples = None) -> tuple[NormFacts, ...]:
    """The norms of a model, with copies of their state.

    Args:
        model: any module.
        num_samples: see `find_norm_records`.

    Note:
        Nothing is run and nothing is changed. Of a model on the meta device there are no statistics.
    """
    shuffles = _find_shuffles(model)
    return tuple(_read(model, record, shuffles) for record in find_norm_records(model, num_samples))


def _read(model: nn.Module, record: NormRecord, shuffles: Shuffles) -> NormFacts:
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
        given = [value for value in (weight, bias) if isinstance(value, Tensor) and not is_lazy(value)]
        tensors = [value for value in given if value.dim() == 1]
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

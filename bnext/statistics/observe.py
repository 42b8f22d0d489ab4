"""What reaches the norms of a model, while everything else of the model is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d, DomainState
from bnext.scope.statistics import answering
from bnext.statistics.collector import Collector

__all__ = [
    "Selection",
    "collect_moments",
    "find_input",
    "find_replaceable",
    "keeping_counters",
    "name_features",
    "leaving_population_aside",
    "restoring",
    "select_norms",
]

Selection = Callable[[str, nn.Module], bool]


def select_norms(model: nn.Module, layers: Selection | None = None) -> list[tuple[str, _BatchNorm]]:
    """The batch norms of a model that have running statistics which are not frozen, by path.

    Args:
        layers: called as layers(path, module); None: all.

    Raises:
        StatisticsError: there is none.
    """
    norms = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, DomainState):
            continue
        tracks = module.running_mean is not None
        if isinstance(module, BatchNorm2d):
            tracks = any(module.populations()) and not module.spec.has_frozen_statistics
        if tracks and (layers is None or layers(path, module)):
            norms.append((path, module))
    if not norms:
        raise StatisticsError(
            f"model must have a batch norm with running statistics that is selected; got none "
            f"({type(model).__name__}). Frozen norms and GroupNorm have nothing to re-estimate."
        )
    return norms


def find_replaceable(model: nn.Module) -> list[str]:
    """Paths of the batch norms that `select_norms` gives; none if there are none."""
    try:
        return [path for path, _ in select_norms(model)]
    except StatisticsError:
        return []


@contextlib.contextmanager
def collect_moments(
    norms: list[tuple[str, _BatchNorm]], collectors: Mapping[str, Mapping[str, Collector]], training: bool = True
) -> Iterator[None]:
    """In this scope collectors get what reaches their norms, which must be in this mode."""
    hooks = [
        norm.register_forward_pre_hook(_make_hook(path, collectors[path], training), with_kwargs=True)
        for path, norm in norms
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _make_hook(path: str, by_name: Mapping[str, Collector], training: bool) -> Callable[[nn.Module, Any, Any], None]:
    def collect(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training != training:
            raise StatisticsError(
                f"forward must leave the mode of norms as it is; got training={module.training} ({path}). Do not call "
                f"model.{'train' if module.training else 'eval'}() in it."
            )
        joint: dict[Collector, list[Tensor]] = {}
        for name, feature in name_features(module, find_input(args, kwargs)):
            if name not in by_name:
                continue  # the norm itself refuses an unknown level
            own = by_name[name]
            _check_has_variance(module, feature, own)
            if isinstance(module, BatchNorm2d) and module.spec.statistics != "shared":
                own.add([feature])
            else:
                joint.setdefault(own, []).append(feature)
        for own, features in joint.items():
            own.add(features)

    return collect


def find_input(args: Any, kwargs: Any) -> Any:
    """What a norm was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _check_has_variance(norm: nn.Module, feature: Tensor, own: Collector) -> None:
    """torch's norms refuse a single element without saying which of them; others know what to do with it."""
    is_single = feature.numel() == feature.shape[1]
    if norm.training and is_single and len(feature) and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        raise StatisticsError(
            f"a mini-batch must hold more than 1 element per channel; got 1 ({own.where}, batch "
            f"{own.num_batches + 1}). Use larger batches (drop_last=True for the last one), or convert the norm with "
            f"convert_norm(model, {{'': NormSpec(single_element='population')}})."
        )


def name_features(norm: nn.Module, given: Any) -> Iterator[tuple[str, Tensor]]:
    """What a norm is called with, by level or domain; a mixed batch is taken apart."""
    if isinstance(given, Mapping):
        yield from given.items()
        return
    domains = norm.find_domains(len(given)) if isinstance(norm, BatchNorm2d) else 0
    names = norm.domains if isinstance(norm, BatchNorm2d) and norm.domains else ("",)
    if isinstance(domains, int):
        yield names[domains], given
        return
    for domain in sorted(set(domains)):
        yield names[domain], given[[own == domain for own in domains]]


def leaving_population_aside(norms: list[tuple[str, _BatchNorm]]) -> contextlib.AbstractContextManager[None]:
    """A scope in which norms in training mode are normalized by their mini-batch alone.

    With renorm, or training="population", what they give would depend on the statistics that are to be replaced.
    """
    return answering([norm for _, norm in norms if isinstance(norm, BatchNorm2d)], training="mini_batch")


@contextlib.contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Put modes and buffers of a model back after this scope, bit by bit, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@contextlib.contextmanager
def keeping_counters(model: nn.Module) -> Iterator[None]:
    """Put the whole numbers that modules hold as attributes back after this scope.

    A module may count its calls, as detectron2's CycleBatchNormList does to know its level; after a forward that was
    broken off it would be wrong for ever.
    """
    before = [(module, {k: v for k, v in vars(module).items() if type(v) is int}) for module in model.modules()]
    try:
        yield
    finally:
        for module, numbers in before:
            vars(module).update(numbers)

"""The norms of a model that have statistics to estimate, and what reaches them in a forward.

A set of running statistics goes by the module that holds it, its state: the norm, or what one of its levels or domains
owns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.unseen import is_unseen
from bnext.layers.walk import Selection, find_norms
from bnext.scope.record import get_record

__all__ = ["Features", "find_replaceable", "list_populations", "select_norms", "watching"]

Features = Iterable[tuple[Any, Tensor]]


def find_replaceable(model: nn.Module, layers: Selection | None = None) -> dict[str, _BatchNorm]:
    """Path -> batch norm that has running statistics which are not frozen.

    Args:
        layers: called as layers(path, norm) for each of them; None: all.
    """

    def is_replaceable(path: str, norm: Any) -> bool:
        is_frozen = isinstance(norm, BatchNorm2d) and norm.spec.has_frozen_statistics
        has_state = any(state.running_mean is not None for _, state in list_populations(norm))
        return has_state and not is_frozen and (layers is None or layers(path, norm))

    return find_norms(model, is_replaceable)


def select_norms(model: nn.Module, layers: Selection | None = None) -> dict[str, _BatchNorm]:
    """The same as `find_replaceable`.

    Raises:
        StatisticsError: there is none.
    """
    norms = find_replaceable(model, layers)

    if not norms:
        rule = "have a batch norm with running statistics that is selected"
        remedy = "Frozen statistics are re-estimated after unfreeze_norms(model); GroupNorm has none."
        raise StatisticsError.of("model", rule, got="none", where=type(model).__name__, remedy=remedy)
    return norms


def list_populations(norm: _BatchNorm) -> Iterable[tuple[tuple[str, ...], Any]]:
    """The state of each set of running statistics, with the levels or domains that it normalizes."""
    return norm.populations() if isinstance(norm, BatchNorm2d) else [((), norm)]


@contextlib.contextmanager
def watching(norms: Mapping[str, _BatchNorm], watch: Callable[[str, nn.Module, Features], None]) -> Iterator[None]:
    """In this scope `watch` is called as watch(path, norm, features) before every call of a norm.

    `features` are what the norm is called with, each with its state; a mixed batch is taken apart. Samples of unseen
    domains, which have none, are left out.
    """

    def see(path: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))  # by position or by name
        watch(path, norm, _divide(norm, given))

    with contextlib.ExitStack() as hooks:
        for path, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(partial(see, path), with_kwargs=True))
        yield


def _divide(norm: nn.Module, given: Any) -> Features:
    if not isinstance(norm, BatchNorm2d):
        yield norm, given
        return

    features, of_features = norm.list_features(given, get_record().domain)
    names = norm.name_sources(of_features)

    for feature, sources in zip(features, of_features, strict=True):
        if isinstance(sources, int):
            parts = {sources: feature}
        else:
            parts = {number: feature[[source == number for source in sources]] for number in sorted(set(sources))}

        for number, part in parts.items():
            if not is_unseen(names[number]):
                yield norm.population_state(names[number]), part

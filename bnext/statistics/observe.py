"""Which norms of a model have statistics to estimate, and what reaches them in a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.walk import Selection, find_norms
from bnext.statistics.collector import Collector

__all__ = ["Features", "collecting", "find_replaceable", "name_features", "select_norms", "watching"]

Norms = Mapping[str, _BatchNorm]
Features = Iterator[tuple[str, Tensor]]


def find_replaceable(model: nn.Module, layers: Selection | None = None) -> dict[str, _BatchNorm]:
    """Path -> batch norm that has running statistics which are not frozen.

    Args:
        layers: called as layers(path, norm) for each of them; None: all.
    """

    def is_replaceable(path: str, norm: nn.Module) -> bool:
        tracks = norm.running_mean is not None
        if isinstance(norm, BatchNorm2d):
            tracks = any(norm.populations()) and not norm.spec.has_frozen_statistics
        return tracks and (layers is None or layers(path, norm))

    return find_norms(model, is_replaceable)


def select_norms(model: nn.Module, layers: Selection | None = None) -> dict[str, _BatchNorm]:
    """The same as `find_replaceable`.

    Raises:
        StatisticsError: there is none.
    """
    norms = find_replaceable(model, layers)

    if not norms:
        raise StatisticsError.of(
            "model",
            "have a batch norm with running statistics that is selected",
            got="none",
            where=type(model).__name__,
            remedy="Frozen norms and GroupNorm have nothing to re-estimate.",
        )
    return norms


@contextlib.contextmanager
def watching(norms: Norms, watch: Callable[[str, nn.Module, Features], None]) -> Iterator[None]:
    """In this scope `watch` is called as watch(path, norm, features) before every call of a norm.

    `features` are what the norm is called with, by level or domain; see `name_features`.
    """

    def see(path: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))  # by position or by name
        watch(path, norm, name_features(norm, given))

    with contextlib.ExitStack() as hooks:
        for path, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(partial(see, path), with_kwargs=True))
        yield


def name_features(norm: nn.Module, given: Any) -> Features:
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
        yield names[domain], given[[index == domain for index in domains]]


@contextlib.contextmanager
def collecting(
    norms: Norms, collectors: Mapping[str, Mapping[str, Collector]], *, training: bool = True
) -> Iterator[None]:
    """In this scope collectors, by path and name, get what reaches their norms, which must be in this mode."""

    def collect(path: str, norm: nn.Module, features: Features) -> None:
        if norm.training != training:
            mode = "train" if norm.training else "eval"
            raise StatisticsError.of(
                "forward",
                "leave the mode of norms as it is",
                got=f"training={norm.training}",
                where=path,
                remedy=f"Do not call model.{mode}() in it.",
            )

        is_joint = not isinstance(norm, BatchNorm2d) or norm.spec.statistics == "shared"
        mini_batches: dict[Any, tuple[Collector, list[Tensor]]] = {}
        for name, feature in features:
            collector = collectors[path].get(name)
            if collector is None:
                continue  # the norm itself refuses an unknown level
            _check_has_variance(norm, feature, collector)
            key = collector if is_joint else name
            mini_batches.setdefault(key, (collector, []))[1].append(feature)

        for collector, mini_batch in mini_batches.values():
            collector.add(mini_batch)

    with watching(norms, collect):
        yield


def _check_has_variance(norm: nn.Module, feature: Tensor, collector: Collector) -> None:
    """Torch's norms refuse a single element without saying which of them; others know what to do with it."""
    is_single = feature.numel() == feature.shape[1] and len(feature) > 0
    if norm.training and is_single and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        raise StatisticsError.of(
            "a mini-batch",
            "hold more than 1 element per channel",
            got="1",
            where=f"{collector.where}, batch {collector.num_batches + 1}",
            remedy="Use larger batches (drop_last=True for the last one), or convert the norm with "
            "convert_norm(model, {'': NormSpec(single_element='population')}).",
        )

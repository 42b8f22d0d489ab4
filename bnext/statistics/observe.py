"""Moments of what reaches the norms of a model, while everything else of the model is as it was.

One collector for each set of population statistics. Moments are merged in float64 over calls and batches; how they
differ from batch to batch gives the standard error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import all_gather_stacked, merge_moments_over_workers, resolve_group
from bnext.errors import StatisticsError
from bnext.functional import Moments, Spread, batch_moments, merge_moments, merge_spreads, spread_of_batch
from bnext.layers.batch_norm import BatchNorm2d, DomainState
from bnext.layers.scopes import answering

__all__ = [
    "Collector",
    "Selection",
    "collect_moments",
    "find_input",
    "find_replaceable",
    "keeping_counters",
    "make_collectors",
    "name_features",
    "normalizing_by_mini_batch",
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


class Collector:
    """What one set of population statistics is to describe.

    Attributes:
        path: of the norm in its model.
        names: the levels or domains that the set normalizes; empty for a norm without.
        state: the module that holds the running statistics.
        total: moments of all batches, [C].
        spread: how the batches differ.
        num_samples: images, or RoIs, that were seen; those of several levels once.
        num_batches: ends of batches, whether the set was reached in them or not.
        moving: mean and variance (correction 1) as a moving average has them, [2, C]; begins with the state's.
    """

    def __init__(self, path: str, names: tuple[str, ...], state: Any, momentum: float = 0.1) -> None:
        self.path, self.names, self.state = path, names, state
        zeros = torch.zeros(state.num_features, dtype=torch.float64, device=state.running_mean.device)
        self.total = Moments(zeros.new_zeros(()), zeros, zeros.clone())
        self.spread = spread_of_batch(self.total)
        self.num_samples = self.num_batches = 0
        self.moving = torch.stack([state.running_mean, state.running_var]).double()
        self._momentum = momentum
        self._is_moved = False
        self._calls: list[Moments] = []
        self._samples = 0

    @property
    def where(self) -> str:
        """Path and, where there is one, level or domain, in messages."""
        return ".".join([self.path, *self.names[:1]])

    def add(self, feature: Tensor) -> None:
        """Take in what a call of the norm got, [N, C, ...]."""
        new = batch_moments(feature.double())  # float32 would round the mean of a batch far from zero
        if not torch.isfinite(new.var).all() or not torch.isfinite(new.mean).all():
            raise StatisticsError(
                f"activations must be finite; got NaN or Inf ({self.where}, batch {self.num_batches + 1}). The "
                f"statistics are as they were; look for what in that batch or before that layer makes them."
            )
        self._calls.append(new)
        self._samples = max(self._samples, len(feature))

    def end_batch(self) -> None:
        """What was added since the last end is one batch."""
        self.num_batches += 1
        if not self._calls:
            return
        batch = merge_moments(_stack(self._calls))
        self.total = merge_moments(_stack([self.total, batch]))
        self.spread = merge_spreads(_stack([self.spread, spread_of_batch(batch)]))
        if batch.count > 1:  # an empty batch moves nothing; one element has no variance
            self.moving = torch.lerp(self.moving, torch.stack([batch.mean, batch.unbiased_var()]), self._momentum)
            self._is_moved = True
        self.num_samples += self._samples
        self._calls, self._samples = [], 0

    def merged_over_workers(self) -> tuple[Moments, Spread, int]:
        """Total, spread and number of samples over all workers. A collective."""
        everyone = resolve_group("all")
        if everyone is None:
            return self.total, self.spread, self.num_samples
        total = merge_moments_over_workers(self.total, everyone, self.where)
        fields = [field.reshape(-1) for field in self.spread]
        message = torch.cat([*fields, fields[0].new_tensor([self.num_samples])])
        gathered = all_gather_stacked(message, everyone, self.where)
        parts = gathered.split([len(field) for field in fields] + [1], dim=1)
        shapes = [field.shape for field in self.spread]
        stacked = Spread(*(part.reshape(-1, *shape) for part, shape in zip(parts[:-1], shapes, strict=True)))
        return total, merge_spreads(stacked), int(parts[-1].sum())

    def moving_over_workers(self) -> Tensor:
        """The mean of `moving` over the workers that have moved theirs. A collective."""
        weight = self.moving.new_full((1, *self.moving.shape[1:]), float(self._is_moved))
        every = all_gather_stacked(torch.cat([self.moving * weight, weight]), resolve_group("all"), self.where)
        *moving, number = every.sum(0)
        return torch.where(number > 0, torch.stack(moving) / number.clamp(min=1), self.moving)

    def state_dict(self) -> dict[str, Any]:
        """What was collected, to go on with later."""
        counts = {"num_samples": self.num_samples, "num_batches": self.num_batches}
        return {
            "total": tuple(self.total),
            "spread": tuple(self.spread),
            "moving": self.moving,
            "is_moved": self._is_moved,
            **counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was collected before."""
        device = self.total.mean.device
        shapes = [field.shape for field in (*state["total"], *state["spread"], state["moving"])]
        if shapes != [field.shape for field in (*self.total, *self.spread, self.moving)]:
            raise StatisticsError(f"a kept state must be of as many channels; got {list(shapes[1])} ({self.where}).")
        self.total = Moments(*(field.to(device) for field in state["total"]))
        self.spread = Spread(*(field.to(device) for field in state["spread"]))
        self.moving, self._is_moved = state["moving"].to(device), state["is_moved"]
        self.num_samples, self.num_batches = state["num_samples"], state["num_batches"]


def _stack(parts: list[Any]) -> Any:
    return type(parts[0])(*(torch.stack(fields) for fields in zip(*parts, strict=True)))


def make_collectors(norms: list[tuple[str, _BatchNorm]], momentum: float = 0.1) -> dict[str, dict[str, Collector]]:
    """For each norm by its path, its collectors by level or domain ("": neither), one for each population."""
    collectors: dict[str, dict[str, Collector]] = {}
    for path, norm in norms:
        if not isinstance(norm, BatchNorm2d):
            collectors[path] = {"": Collector(path, (), norm, momentum)}
            continue
        collectors[path] = {}
        for names, state in norm.populations():
            collectors[path].update(dict.fromkeys(names or ("",), Collector(path, names, state, momentum)))
    return collectors


@contextlib.contextmanager
def collect_moments(
    norms: list[tuple[str, _BatchNorm]], collectors: Mapping[str, Mapping[str, Collector]]
) -> Iterator[None]:
    """In this scope collectors get what reaches their norms."""
    hooks = [norm.register_forward_pre_hook(_make_hook(collectors[path]), with_kwargs=True) for path, norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _make_hook(by_name: Mapping[str, Collector]) -> Callable[[nn.Module, Any, Any], None]:
    def collect(module: nn.Module, args: Any, kwargs: Any) -> None:
        for name, feature in name_features(module, find_input(args, kwargs)):
            if name in by_name:  # the norm itself refuses an unknown level
                by_name[name].add(feature)
                _check_has_variance(module, feature, by_name[name])

    return collect


def find_input(args: Any, kwargs: Any) -> Any:
    """What a norm was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _check_has_variance(norm: nn.Module, feature: Tensor, own: Collector) -> None:
    """torch's norms refuse a single element without saying which of them; bnext's know what to do with it."""
    is_single = feature.numel() == feature.shape[1]
    if norm.training and is_single and len(feature) and not isinstance(norm, BatchNorm2d):
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


def normalizing_by_mini_batch(norms: list[tuple[str, _BatchNorm]]) -> contextlib.AbstractContextManager[None]:
    """A scope in which norms in training mode are normalized by their mini-batch alone.

    With renorm, or training="population", what they give would depend on the statistics that are to be replaced.
    """
    return answering([norm for _, norm in norms if isinstance(norm, BatchNorm2d)], training="mini_batch")


@contextlib.contextmanager
def restoring(model: nn.Module, norms: list[tuple[str, _BatchNorm]]) -> Iterator[None]:
    """Put modes and buffers of a model back after this scope, bit by bit, also after an exception.

    Args:
        norms: whose buffers may be written to.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [buffer for _, norm in norms for buffer in norm.buffers()]
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

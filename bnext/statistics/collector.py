"""What is known of one set of population statistics: merged in float64 over calls, batches and workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnext.distributed import all_gather_stacked, merge_moments_over_workers, resolve_group
from bnext.errors import StatisticsError
from bnext.functional import Moments, Spread, batch_moments, merge_moments, merge_spreads, spread_of_batch
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d

__all__ = ["Collected", "Collector", "make_collectors"]


class Collected(NamedTuple):
    """What all workers have collected for a set.

    Args:
        total: moments of all elements, [C].
        spread: how the batches differ.
        num_samples: images or RoIs that were seen; those of several levels once.
        num_images: of the set's domain, where that is known; at most `num_samples`.
        num_updates: that a moving average would have taken.
        average: mean of their means and variances (correction 1), each counted alike, [2, C].
        former: running mean and variance, merged over workers, [2, C].
    """

    total: Moments
    spread: Spread
    num_samples: int
    num_images: int
    num_updates: int
    average: Tensor
    former: Tensor


class Collector:
    """What one set of population statistics is to describe.

    Attributes:
        path: of the norm in its model.
        names: the levels or domains that the set normalizes; empty for a norm without.
        state: the module that holds the running statistics.
        num_batches: ends of batches, whether the set was reached in them or not.
        moving: mean and variance (correction 1) as a moving average has them, [2, C]; begins with the state's.
    """

    def __init__(
        self, path: str, names: tuple[str, ...], state: Any, momentum: float = 0.1, has_domains: bool = False
    ) -> None:
        self.path, self.names, self.state = path, names, state
        _check_buffer(state.running_mean, self.where)
        zeros = torch.zeros(state.num_features, dtype=torch.float64, device=state.running_mean.device)
        self.total = Moments(zeros.new_zeros(()), zeros, zeros.clone())
        self.spread = spread_of_batch(self.total)
        self.num_samples = self.num_images = self.num_batches = self.num_updates = 0
        self.moving = torch.stack([state.running_mean, state.running_var]).double()
        self.average = torch.zeros_like(self.moving)
        self._momentum, self._has_domains = momentum, has_domains
        self._updates: list[Moments] = []
        self._samples = 0

    @property
    def where(self) -> str:
        """Path and, where there is one, level or domain, in messages."""
        return ".".join([self.path, *self.names[:1]])

    @property
    def is_reached(self) -> bool:
        """Whether something was added since the last end of a batch."""
        return bool(self._updates)

    def add(self, features: Sequence[Tensor]) -> None:
        """Take in what is one mini-batch to the norm, each [N, C, ...]: one update of a moving average."""
        # float32 would round the mean of a batch far from zero
        parts = [batch_moments(feature.double()) for feature in features]
        new = merge_moments(_stack(parts))
        if not torch.isfinite(new.var).all() or not torch.isfinite(new.mean).all():
            raise StatisticsError(
                f"activations must be finite; got NaN or Inf ({self.where}, batch {self.num_batches + 1}). The "
                f"statistics are as they were; look for what in that batch or before that layer makes them."
            )
        self._updates.append(new)
        self._samples = max([self._samples, *map(len, features)])

    def end_batch(self, images: Mapping[str, int]) -> None:
        """What was added since the last end is one batch.

        Args:
            images: domain -> images of the batch; "": of no domain, or of one that the caller has named.
        """
        self.num_batches += 1
        if not self._updates:
            return
        batch = merge_moments(_stack(self._updates))
        self.total = merge_moments(_stack([self.total, batch]))
        self.spread = merge_spreads(_stack([self.spread, spread_of_batch(batch)]))
        for update in self._updates:
            self._update(update)
        own = [number for name, number in images.items() if not (name and self._has_domains) or name in self.names]
        self.num_samples += self._samples
        self.num_images += min(self._samples, sum(own) or sum(images.values()))  # or those of a fallback domain
        self._updates, self._samples = [], 0

    def _update(self, new: Moments) -> None:
        if new.count <= 1:
            return  # an empty mini-batch moves nothing; one element has no variance
        values = torch.stack([new.mean, new.unbiased_var()])
        self.num_updates += 1
        self.average = self.average + (values - self.average) / self.num_updates
        self.moving = torch.lerp(self.moving, values, self._momentum)

    def collect_over_workers(self) -> Collected:
        """Everything over all workers. A collective."""
        former = torch.stack([self.state.running_mean, self.state.running_var]).double()
        counts = (self.num_samples, self.num_images, self.num_updates)
        everyone = resolve_group("all")
        if everyone is None:
            return Collected(self.total, self.spread, *counts, self.average, former)
        total = merge_moments_over_workers(self.total, everyone, self.where)
        fields = [*self.spread, self.average, former, former.new_tensor(counts)]
        message = torch.cat([field.reshape(-1) for field in fields])
        gathered = all_gather_stacked(message, everyone, self.where)
        parts = gathered.split([field.numel() for field in fields], dim=1)
        *spread, average, former, counts = (
            part.reshape(-1, *field.shape) for part, field in zip(parts, fields, strict=True)
        )
        updates = counts[:, 2]
        share = (updates / updates.sum().clamp(min=1)).view(-1, 1, 1)
        num_samples, num_images, num_updates = (int(number) for number in counts.sum(0))
        averages = (share * average).sum(0), _merge_populations(former)
        return Collected(total, merge_spreads(Spread(*spread)), num_samples, num_images, num_updates, *averages)

    def moving_over_workers(self) -> Tensor:
        """The mean of `moving` over the workers that have moved theirs. A collective."""
        weight = self.moving.new_full((1, *self.moving.shape[1:]), float(self.num_updates > 0))
        every = all_gather_stacked(torch.cat([self.moving * weight, weight]), resolve_group("all"), self.where)
        *moving, number = every.sum(0)
        return torch.where(number > 0, torch.stack(moving) / number.clamp(min=1), self.moving)

    def state_dict(self) -> dict[str, Any]:
        """What was collected, to go on with later."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            "total": tuple(self.total),
            "spread": tuple(self.spread),
            "moving": self.moving,
            "average": self.average,
            **counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was collected before."""
        device = self.total.mean.device
        shapes = [field.shape for field in (*state["total"], *state["spread"], state["moving"], state["average"])]
        if shapes != [field.shape for field in (*self.total, *self.spread, self.moving, self.average)]:
            raise StatisticsError(f"a kept state must be of as many channels; got {list(shapes[1])} ({self.where}).")
        self.total = Moments(*(field.to(device) for field in state["total"]))
        self.spread = Spread(*(field.to(device) for field in state["spread"]))
        self.moving, self.average = state["moving"].to(device), state["average"].to(device)
        for name in _COUNTS:
            setattr(self, name, int(state[name]))


_COUNTS = ("num_samples", "num_images", "num_batches", "num_updates")


def _stack(parts: Sequence[Any]) -> Any:
    return type(parts[0])(*(torch.stack(fields) for fields in zip(*parts, strict=True)))


def _merge_populations(every: Tensor) -> Tensor:
    """Running statistics of all workers, [R, 2, C], as parts of one population; those that agree stay bit by bit."""
    if torch.equal(every, every[:1].expand_as(every)):
        return every[0]
    merged = merge_moments(Moments(every.new_ones(len(every)), *every.unbind(1)))
    return torch.stack([merged.mean, merged.var])


def _check_buffer(buffer: Tensor, where: str) -> None:
    rules = {
        "have been initialized": (is_lazy(buffer), "a lazy norm", "Run a batch through the model first"),
        "hold values": (not is_lazy(buffer) and buffer.is_meta, "the meta device", "Load weights first"),
        "be ordinary tensors": (
            not is_lazy(buffer) and buffer.is_inference(),
            "tensors of torch.inference_mode",
            "Build the model outside of it",
        ),
    }
    for rule, (is_broken, got, remedy) in rules.items():
        if is_broken:
            raise StatisticsError(f"running statistics must {rule}; got {got} ({where}). {remedy}.")


def make_collectors(norms: list[tuple[str, _BatchNorm]], momentum: float = 0.1) -> dict[str, dict[str, Collector]]:
    """For each norm by its path, its collectors by level or domain ("": neither), one for each population."""
    collectors: dict[str, dict[str, Collector]] = {}
    for path, norm in norms:
        if not isinstance(norm, BatchNorm2d):
            collectors[path] = {"": Collector(path, (), norm, momentum)}
            continue
        has_domains = bool(norm.domains) and not isinstance(norm, LevelBatchNorm2d)
        collectors[path] = {}
        for names, state in norm.populations():
            own = Collector(path, names, state, momentum, has_domains)
            collectors[path].update(dict.fromkeys(names or ("",), own))
    return collectors

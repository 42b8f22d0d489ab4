"""Adaptation at test time: population statistics that follow the stream of what is evaluated, and a way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import unwrap_model
from bnext.errors import StatisticsError
from bnext.functional import Moments, batch_moments, merge_moments
from bnext.layers.batch_norm import BatchNorm2d
from bnext.scope.statistics import is_recomputing
from bnext.statistics.arguments import check_momentum, check_source_samples
from bnext.statistics.observe import Selection, find_input, name_features, restoring, select_norms

__all__ = ["OnlineStatistics", "following_stream"]


@contextlib.contextmanager
def following_stream(
    model: nn.Module,
    *,
    momentum: float | None = 0.1,
    source_samples: float = 0,
    layers: Selection | None = None,
) -> Iterator[OnlineStatistics]:
    """In this scope, in evaluation mode, running statistics follow what the norms get; then they are as before.

    Every batch is taken in before it is normalized. With a momentum a drift is followed; without one, all that was
    seen counts alike, and the former statistics as much as `source_samples` images:

        momentum:      new = (1 - momentum) * former + momentum * moments of the batch
        source_samples: new = (source_samples * source + n * moments of the n samples so far) / (source_samples + n)

    Args:
        model: any torch model; its norms are normalized by population statistics at inference.
        momentum: in torch's sense, above 0 and at most 1; None: by `source_samples`.
        source_samples: 0 or more; of a RoI head these are RoIs.
        layers: called as layers(path, module), says which norms; None: all.

    Yields:
        What follows; its `reset()` goes back to the source within the scope.

    Raises:
        StatisticsError: an argument is out of range, no norm is selected, activations are not finite.

    Note:
        Every worker follows its own stream. Predictions depend on the order of the images. A norm that is called
        several times in a forward takes in each call; its samples are counted once. If parts of the model are called
        without it, as by `model.inference(...)`, every call of a norm counts as other samples. A backward pass must
        lie in the scope, before the next batch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        >>> with following_stream(model, momentum=0.2):
        ...     outputs = [model(torch.randn(1, 3, 8, 8)) for _ in range(3)]
        >>> float(model[1].running_mean.abs().max())
        0.0

    Source:
        Schneider et al., *Improving robustness against common corruptions by covariate shift adaptation*, 2020;
        Mirza et al., *The Norm Must Go On*, 2022 (following by momentum).
    """
    if momentum is not None:
        check_momentum(momentum, "following_stream", ", or None")
    check_source_samples(source_samples, "following_stream")
    if source_samples and momentum is not None:
        raise StatisticsError(
            f"source_samples must be 0 with a momentum; got {source_samples} with momentum={momentum} "
            f"(following_stream). Set momentum=None to count samples."
        )
    model = unwrap_model(model)
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise StatisticsError(
            f"model must not be compiled, as its statistics could not follow; got {type(model).__name__} "
            f"(following_stream). Pass the model that was given to torch.compile."
        )
    norms = select_norms(model, layers)
    with restoring(model):
        following = OnlineStatistics(model, norms, momentum, source_samples)
        try:
            yield following
        finally:
            following.remove()


class OnlineStatistics:
    """See `following_stream`. `num_batches` counts the forwards of the model in evaluation mode."""

    def __init__(
        self,
        model: nn.Module,
        norms: list[tuple[str, _BatchNorm]],
        momentum: float | None,
        source_samples: float,
    ) -> None:
        self._momentum, self._source_samples = momentum, source_samples
        self.num_batches = 0
        self._counted: dict[Any, int] = {}  # samples of this forward
        self._source: dict[Any, Tensor] = {}
        self._seen: dict[Any, tuple[Moments, int]] = {}
        for _, norm in norms:
            for state in _list_states(norm):
                self._source[state] = torch.stack([state.running_mean, state.running_var]).double()
        self._is_in_forward = False
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        self._handles += [
            norm.register_forward_pre_hook(self._make_hook(path), with_kwargs=True) for path, norm in norms
        ]

    def reset(self) -> None:
        """Go back to the statistics of the source; the stream begins anew."""
        self._seen, self.num_batches = {}, 0
        for state, (mean, var) in self._source.items():
            _set(state, mean, var)

    def remove(self) -> None:
        """Follow no longer."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: Any) -> None:
        if not is_recomputing():
            self._counted, self._is_in_forward = {}, True
            self.num_batches += not model.training

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._is_in_forward = False

    def _make_hook(self, path: str) -> Any:
        def follow(norm: nn.Module, args: Any, kwargs: Any) -> None:
            if norm.training or is_recomputing():  # checkpointing calls it again in the backward pass
                return
            if not self._is_in_forward:
                self._counted = {}
            calls: dict[Any, list[Tensor]] = {}
            for name, feature in name_features(norm, find_input(args, kwargs)):
                state = norm.population_state(name) if isinstance(norm, BatchNorm2d) else norm
                calls.setdefault(state, []).append(feature)
            for state, features in calls.items():
                self._take_in(state, features, path)

        return follow

    @torch.no_grad()
    def _take_in(self, state: Any, features: list[Tensor], where: str) -> None:
        """Levels that share a population are one batch to it."""
        parts = [batch_moments(feature.double()) for feature in features]
        new = merge_moments(Moments(*(torch.stack(fields) for fields in zip(*parts, strict=True))))
        if new.count < 2:
            return  # one element has no variance
        if not torch.isfinite(new.mean).all() or not torch.isfinite(new.var).all():
            raise StatisticsError(
                f"activations must be finite; got NaN or Inf ({where}). The statistics have not taken them in; look "
                f"for the image that makes them."
            )
        if self._momentum is not None:
            former = torch.stack([state.running_mean, state.running_var]).double()
            _set(state, *torch.lerp(former, torch.stack([new.mean, new.unbiased_var()]), self._momentum))
            return
        before, number = self._seen.get(state, (Moments(*(torch.zeros_like(field) for field in new)), 0))
        seen = merge_moments(Moments(*(torch.stack(pair) for pair in zip(before, new, strict=True))))
        counted, samples = self._counted.get(state, 0), max(len(feature) for feature in features)
        number += max(samples - counted, 0)  # another call of one forward has the same samples
        self._counted[state] = max(samples, counted)
        self._seen[state] = seen, number
        weight = number / (number + self._source_samples)
        target = torch.stack([seen.mean, seen.unbiased_var()])
        _set(state, *torch.lerp(self._source[state], target, weight))


def _list_states(norm: _BatchNorm) -> list[Any]:
    return [state for _, state in norm.populations()] if isinstance(norm, BatchNorm2d) else [norm]


def _set(state: Any, mean: Tensor, var: Tensor) -> None:
    state.running_mean.copy_(mean)
    state.running_var.copy_(var)

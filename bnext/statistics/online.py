"""Adaptation at test time: population statistics that follow the stream of what is evaluated, and a way back."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import unwrap_model
from bnext.errors import StatisticsError
from bnext.functional import Moments
from bnext.layers.kept import note_statistics
from bnext.layers.streams import Stream, keep_near
from bnext.layers.walk import Selection
from bnext.scope.model import keeping_buffers, keeping_modes
from bnext.scope.recomputation import is_recomputing
from bnext.statistics.arguments import check_numbers
from bnext.statistics.collector import measure
from bnext.statistics.observe import Features, list_populations, select_norms, watching

__all__ = ["OnlineStatistics", "following_stream"]

_WHERE = "following_stream"
ONE_SAMPLE = (
    "The stream of following_stream was of a single sample, which the statistics have followed. Let more come in one "
    "scope; with momentum=None and source_samples the former statistics count beside it."
)


@contextlib.contextmanager
def following_stream(
    model: nn.Module,
    *,
    momentum: float | None = 0.1,
    source_samples: float = 0,
    bound: float = math.inf,
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
        bound: how far statistics may leave their source, 1 or more: means by so many of its standard deviations,
            standard deviations by this factor. A guard against a stream that drifts away.
        layers: called as layers(path, module), says which norms; None: all.

    Yields:
        What follows; its `reset()` goes back to the source within the scope.

    Raises:
        StatisticsError: an argument is out of range, no norm is selected, activations are not finite.

    Note:
        Every worker follows its own stream. Predictions depend on the order of the images. A norm that is called
        several times in a forward takes in each call; its samples are counted once. Images of domains that a norm has
        not are left to the rule "stream" of its spec, which follows them itself. If parts of the model are called
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
    check_numbers(_WHERE, source_samples=source_samples, bound=bound)
    if momentum is not None:
        check_numbers(_WHERE, momentum=momentum)
    if source_samples and momentum is not None:
        got, remedy = f"{source_samples} with momentum={momentum}", "Set momentum=None to count samples."
        raise StatisticsError.of("source_samples", "be 0 with a momentum", got=got, where=_WHERE, remedy=remedy)

    model = unwrap_model(model)
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        rule, remedy = "not be compiled, as its statistics could not follow", "Pass the model before torch.compile."
        raise StatisticsError.of("model", rule, got=type(model).__name__, where=_WHERE, remedy=remedy)

    norms = select_norms(model, layers)
    following = OnlineStatistics(norms, momentum, source_samples, bound)
    with (
        keeping_modes(model),
        keeping_buffers(part for norm in norms.values() for part in norm.modules()),
        model.register_forward_pre_hook(following._begin),
        model.register_forward_hook(following._end, always_call=True),
        watching(norms, following._follow),
    ):
        yield following
    if following.num_samples == 1:
        logging.getLogger(__name__).warning(ONE_SAMPLE)


class OnlineStatistics:
    """See `following_stream`. `num_batches` counts the forwards of the model in evaluation mode."""

    def __init__(
        self, norms: Mapping[str, _BatchNorm], momentum: float | None, source_samples: float, bound: float = math.inf
    ) -> None:
        self._momentum, self._source_samples, self._bound = momentum, source_samples, bound
        self.num_batches = 0
        self._is_in_forward = False
        self._counted: dict[Any, int] = {}  # samples of this forward
        self._streams: dict[Any, Stream] = {}

        self._source: dict[Any, Tensor] = {}
        for norm in norms.values():
            self._source |= {state: _read(state) for _, state in list_populations(norm)}

    @property
    def num_samples(self) -> int:
        """Samples that have come so far: the most that a set of running statistics has seen."""
        return int(max((stream.number for stream in self._streams.values()), default=0))

    def reset(self) -> None:
        """Go back to the statistics of the source; the stream begins anew."""
        self._streams, self.num_batches = {}, 0
        for state, source in self._source.items():
            _write(state, source)

    def _begin(self, model: nn.Module, args: Any) -> None:
        if not is_recomputing():
            self._counted, self._is_in_forward = {}, True
            self.num_batches += not model.training

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._is_in_forward = False

    def _follow(self, path: str, norm: nn.Module, features: Features) -> None:
        """Take in what a norm is about to normalize."""
        if norm.training or is_recomputing():  # checkpointing calls it again in the backward pass
            return
        if not self._is_in_forward:
            self._counted = {}

        mini_batches: dict[Any, list[Tensor]] = {}  # levels that share a population are one
        for state, feature in features:
            mini_batches.setdefault(state, []).append(feature)

        with torch.no_grad():
            for state, mini_batch in mini_batches.items():
                new = measure(mini_batch, path)
                if new.count >= 2:  # one element has no variance
                    self._take_in(state, new, max(map(len, mini_batch)))

    def _take_in(self, state: Any, new: Moments, num_samples: int) -> None:
        counted = self._counted.get(state, 0)
        self._counted[state] = max(num_samples, counted)
        stream = self._streams.setdefault(state, Stream())
        seen = stream.take_in(new, max(num_samples - counted, 0))  # another call of one forward has the same samples

        source = self._source[state]
        if self._momentum is not None:
            values = torch.lerp(_read(state), _stack(new), self._momentum)
        else:
            share = stream.number / (stream.number + self._source_samples)
            values = torch.lerp(source, _stack(seen), share)

        now, former = Moments(new.count, *values), Moments(new.count, *source)
        near = keep_near(now, former, self._bound, state.eps)
        _write(state, torch.stack([near.mean, near.var]))


def _stack(moments: Moments) -> Tensor:
    """Mean and variance with correction 1, [2, C]."""
    return torch.stack([moments.mean, moments.unbiased_var()])


def _read(state: Any) -> Tensor:
    """Running mean and variance, [2, C]."""
    return torch.stack([state.running_mean, state.running_var]).double()


def _write(state: Any, values: Tensor) -> None:
    state.running_mean.copy_(values[0])
    state.running_var.copy_(values[1])
    note_statistics(state)

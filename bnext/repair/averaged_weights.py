"""An exponential moving average of a model's weights, with an explicit rule for its buffers.

copied:        the buffers of the model as they are when the average is used
averaged:      floating point buffers are averaged as the weights; counters, and what is inf or NaN, are copied
re_estimated:  the population statistics are estimated for the averaged weights; other buffers are copied
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bnext.distributed import resolve_group, unwrap_model
from bnext.distributed.equal_buffers import equalize_buffers, norm_buffers
from bnext.errors import CheckpointError, ConfigError, Refusal, check_choice
from bnext.layers.kept import note_statistics
from bnext.numbers import is_count, is_number
from bnext.scope.model import restoring
from bnext.statistics.observe import find_replaceable

__all__ = ["AveragedWeights", "BufferRule"]

BufferRule = Literal["copied", "averaged", "re_estimated"]

OTHER_DECAY = Refusal(
    ConfigError, "decay", "be a number from 0 to below 1", "Use 0.999; 0 is the weights of now, without an average."
)
NO_ESTIMATE = Refusal(
    ConfigError,
    "re_estimate",
    "be given where buffers='re_estimated'",
    "Pass a function that estimates the statistics of the model that it is called with, as "
    "`lambda model: recompute_population_statistics(model, data)`.",
)
OTHER_MODEL = Refusal(
    CheckpointError,
    "an average of weights",
    "be of the model that it is loaded for",
    "Load the state that was saved with this model, or begin a new average.",
)
NO_AVERAGE = Refusal(
    CheckpointError,
    "the state of an average of weights",
    "hold num_updates and averages",
    "Load what `AveragedWeights.state_dict()` gave.",
)


class AveragedWeights:
    """Exponential moving average of the weights of a model in training.

        average <- decay_t * average + (1 - decay_t) * weight,   decay_t = min(decay, (1 + t) / (10 + t))

    Update t = 0, 1, ... begins with the weights that the model has when this is made.

    Args:
        model: whose parameters are averaged; without or within DistributedDataParallel.
        decay: 0 to below 1; about 1 / (1 - decay) updates count.
        buffers: the rule, see the module.
        warms_up: False: decay_t is `decay` from the first update on, so that a short training keeps much of the weights
            that it began with.

    Attributes:
        num_updates: so far.

    Raises:
        ConfigError: a decay or a rule that there is not.

    Note:
        Averages are in the type of their parameter, at least float32: in half precision small steps would be lost.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> average = AveragedWeights(model, decay=0.99)
        >>> average.update(model)  # after every step of the optimizer
        >>> with average.lent_to(model.eval()):
        ...     output = model(torch.randn(2, 3, 4, 4))

    Source:
        Polyak and Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992; the warm-up is that of
        TensorFlow's ExponentialMovingAverage.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, buffers: BufferRule = "averaged", *, warms_up: bool = True
    ) -> None:
        check_choice("buffers", buffers, get_args(BufferRule), where="AveragedWeights")
        if not is_number(decay) or not 0 <= decay < 1:
            raise OTHER_DECAY.of(repr(decay), "AveragedWeights")

        self.decay = decay
        self.buffers: BufferRule = buffers
        self.warms_up = warms_up
        self.num_updates = 0
        model = unwrap_model(model)
        self._averages = {name: _widen(value).clone() for name, value in self._select(model).items()}
        self._estimate: tuple[int, dict[str, Tensor]] = (-1, {})

        weights_and_norms = {name for name, _ in model.named_parameters()} | {name for name, _ in norm_buffers(model)}
        self._others = self._averages.keys() - weights_and_norms

    def _select(self, model: nn.Module) -> dict[str, Tensor]:
        """Name -> what is averaged, the model's own tensors."""
        model = unwrap_model(model)
        selected = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if self.buffers == "averaged":
            floating = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
            selected.update(floating)
        return selected

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights that the model has now."""
        step = self.num_updates
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warms_up else self.decay
        current = self._select(model)
        self._check_names(current)

        averages = [self._averages[name] for name in current]
        now = [value.to(average) for value, average in zip(current.values(), averages, strict=True)]
        get_ema_multi_avg_fn(decay)(averages, now, step)
        for name, average, value in zip(current, averages, now, strict=True):
            if name in self._others:  # a mask of attention, say: inf - inf is no number
                average.copy_(torch.where(average.isfinite(), average, value))
        self.num_updates = step + 1

    @contextlib.contextmanager
    def lent_to(self, model: nn.Module, re_estimate: Callable[[nn.Module], object] | None = None) -> Iterator[None]:
        """In this scope the model has the averaged weights; afterwards it is as it was, bit by bit.

        Args:
            model: of which this is the average.
            re_estimate: called as re_estimate(model) where buffers="re_estimated", unless it was since the last update,
                or the model has no statistics to estimate.

        Raises:
            ConfigError: buffers="re_estimated" without it.

        Note:
            A collective, where `re_estimate` is. Optimizer and gradients stay those of the model's own weights.
        """
        if self.buffers == "re_estimated" and re_estimate is None:
            raise NO_ESTIMATE.of("None", "lent_to")
        model = unwrap_model(model)
        current = self._select(model)
        self._check_names(current)

        parameters = list(model.parameters())
        held = [parameter.detach().clone() for parameter in parameters]
        with restoring(model):
            try:
                self._write(current, self._averages)
                if self.buffers == "re_estimated":
                    self._re_estimate(model, re_estimate)
                _note_all(model)
                yield
            finally:
                for parameter, before in zip(parameters, held, strict=True):
                    parameter.data.copy_(before)  # the data of now: the model may have been moved meanwhile

    def _re_estimate(self, model: nn.Module, re_estimate: Callable[[nn.Module], object] | None) -> None:
        done_at, values = self._estimate
        if done_at == self.num_updates:
            self._write(dict(norm_buffers(model)), values)
        elif find_replaceable(model):
            assert re_estimate is not None
            re_estimate(model)
            self._estimate = (self.num_updates, {name: buffer.clone() for name, buffer in norm_buffers(model)})

    def equalize(self, model: nn.Module) -> None:
        """Give every worker the same averaged statistics, as `equalize_buffers` does of a model. A collective."""
        if self.buffers != "averaged" or resolve_group("all") is None:
            return

        with self.lent_to(model):
            equalize_buffers(unwrap_model(model))
            equal = {name: value.clone() for name, value in norm_buffers(unwrap_model(model))}
        for name, value in equal.items():
            if name in self._averages:
                self._averages[name].copy_(value)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            tensors[name].data.copy_(value)

    def _check_names(self, current: Mapping[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in current.items()}
        if shapes == {name: value.shape for name, value in self._averages.items()}:
            return

        other = next((name for name in shapes if name not in self._averages), None)
        other = other or next((name for name in self._averages if name not in shapes), "another shape")
        raise OTHER_MODEL.of(f"one with other tensors, such as {other}", "AveragedWeights")

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs: number of updates, and name -> average."""
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: it is of another model, or no such state.
        """
        averages = state.get("averages") if isinstance(state, Mapping) else None
        if not isinstance(averages, Mapping) or not is_count(state.get("num_updates")):
            raise NO_AVERAGE.of(f"{state!r:.60}", "AveragedWeights")

        self._check_names(averages)
        self.num_updates = state["num_updates"]
        self._write(self._averages, averages)
        self._estimate = (-1, {})


def _widen(value: Tensor) -> Tensor:
    is_narrow = value.is_floating_point() and torch.finfo(value.dtype).bits < 32
    return value.float() if is_narrow else value


def _note_all(model: nn.Module) -> None:
    for module in model.modules():
        note_statistics(module)

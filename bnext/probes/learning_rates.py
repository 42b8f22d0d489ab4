"""The highest learning rate with which a model trains, by bisection."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from bnext.distributed import unwrap_model
from bnext.errors import ConfigError, Refusal
from bnext.layers.counts import not_counting_domains
from bnext.layers.walk import find_bnext_norms
from bnext.numbers import is_count, is_number
from bnext.probes.training_loss import compute_loss, list_trained, number_batches
from bnext.progress import showing_progress
from bnext.scope.model import keeping_parameters, restoring
from bnext.seeding import derive_seed
from bnext.statistics.data_pass import Forward

__all__ = ["LearningRateSearch", "RateTrial", "highest_learning_rate"]

_RANGE = Refusal(ConfigError, "low and high", "be numbers with 0 < low < high", "Use 0.001 and 10.")
_COUNT = Refusal(ConfigError, "{name}", "be a whole number of {least} or more", "Use the default.")
_DROP = Refusal(ConfigError, "drop", "be a number from 0 to below 1", "Use 0.1.")
_END = 0.2  # share of the steps whose mean loss is that of the end


@dataclasses.dataclass(frozen=True)
class RateTrial:
    """A short training with a learning rate.

    Args:
        rate: its learning rate.
        losses: of its steps; a training that has diverged ends with one that is not finite.
        trains: whether the loss has fallen as far as is asked for.
    """

    rate: float
    losses: tuple[float, ...]
    trains: bool


@dataclasses.dataclass(frozen=True)
class LearningRateSearch:
    """Trials of a search for the highest rate.

    Args:
        trials: in the order of their rates.
    """

    trials: tuple[RateTrial, ...]

    @property
    def highest(self) -> float:
        """The highest rate below which, as far as was tried, every one trains; 0 where the lowest one does not."""
        good = itertools.takewhile(lambda trial: trial.trains, self.trials)
        return max((trial.rate for trial in good), default=0.0)

    @property
    def lowest_failing(self) -> float:
        """The lowest rate that does not train; infinite where all do."""
        return min((trial.rate for trial in self.trials if not trial.trains), default=math.inf)


def highest_learning_rate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_steps: int = 100,
    low: float = 1e-3,
    high: float = 10.0,
    num_trials: int = 8,
    drop: float = 0.1,
    build_optimizer: Callable[[nn.Module, float], Optimizer] | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> LearningRateSearch:
    """Search the highest learning rate with which a model trains from where it is, by bisection of the logarithm.

    A rate trains where all losses are finite and the mean of the last fifth of the steps is below (1 - drop) times the
    loss of the first step.

    Args:
        model: any torch model, a detector too; each trial begins with its present weights.
        batches: as in training, with labels, in a list or loader that can be read again; they are gone through over
            and over.
        num_steps: of a trial.
        low, high: rates, which are tried first; with `low` that does not train, or `high` that does, nothing is
            bisected.
        num_trials: trials at most, 2 or more. Each halves the logarithm of the interval: six after the first two leave
            (high / low) ** (1 / 64).
        drop: the share of its first loss by which a training is to lower it.
        build_optimizer: called as build_optimizer(model, rate); None: SGD with momentum 0.9.
        forward: called as forward(model, batch), gives the losses; default model(batch).
        seed: 0 or more: of what is drawn, such as RoIs; the same for the steps of all trials.

    Raises:
        ConfigError: a range or a number cannot be.
        StatisticsError: no batch, no losses, or nothing is trained.

    Note:
        A rate that diverges is a result. Afterwards, also after an exception, parameters, gradients, buffers, modes,
        plain attributes and random generators are bitwise as they were. In training mode, with dropout. A progress bar
        counts the trials. Gradients are this worker's own.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> def square(model, batch):
        ...     return model.weight.square().sum()
        >>> def descend(model, rate):
        ...     return SGD(model.parameters(), rate)
        >>> search = highest_learning_rate(model, [None], build_optimizer=descend, forward=square, num_trials=12)
        >>> 0.9 < search.highest < 1.0  # each step multiplies the weight by 1 - 2 rate
        True

    Source:
        Bjorck, Gomes, Selman, Weinberger, *Understanding Batch Normalization*, 2018, section 3.
    """
    where = "highest_learning_rate"
    if not (is_number(low) and is_number(high) and 0 < low < high):
        raise _RANGE.of(f"{low!r} and {high!r}", where)
    for name, value, least in (("num_steps", num_steps, 1), ("num_trials", num_trials, 2)):
        if not is_count(value, least):
            raise _COUNT.of(repr(value), where, name=name, least=least)
    if not (is_number(drop) and 0 <= drop < 1):
        raise _DROP.of(repr(drop), where)

    model = unwrap_model(model)
    list_trained(model, where)
    build = build_optimizer or _build_sgd

    with showing_progress("learning rates", num_trials, "trial") as bar:

        def try_rate(rate: float) -> RateTrial:
            norms = find_bnext_norms(model).values()
            with keeping_parameters(model), restoring(model), not_counting_domains(norms):
                model.train()
                losses = _train(model, batches, build(model, rate), num_steps, forward, seed)
            bar.update()
            return RateTrial(rate, tuple(losses), _has_trained(losses, num_steps, drop))

        trials = [try_rate(low)]
        if trials[0].trains:
            trials.append(try_rate(high))
        while len(trials) < num_trials and trials[0].trains and not trials[-1].trains:
            search = LearningRateSearch(tuple(trials))
            trials.append(try_rate(math.sqrt(search.highest * search.lowest_failing)))
            trials.sort(key=lambda trial: trial.rate)
    return LearningRateSearch(tuple(trials))


def _build_sgd(model: nn.Module, rate: float) -> Optimizer:
    return SGD([parameter for parameter in model.parameters() if parameter.requires_grad], rate, momentum=0.9)


def _train(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer,
    num_steps: int,
    forward: Forward | None,
    seed: int,
) -> list[float]:
    """Losses of the steps, until one is not finite."""
    losses: list[float] = []
    while len(losses) < num_steps:
        for _, batch in number_batches(batches, "highest_learning_rate"):
            drawn = derive_seed(seed, len(losses))
            with torch.enable_grad():
                loss = compute_loss(model, batch, forward, drawn, "highest_learning_rate", restores=False)
                optimizer.zero_grad()
                loss.backward()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]) or len(losses) == num_steps:
                return losses
            optimizer.step()
    return losses


def _has_trained(losses: Sequence[float], num_steps: int, drop: float) -> bool:
    if len(losses) < num_steps or not all(map(math.isfinite, losses)):
        return False
    last = max(1, int(_END * num_steps))
    return fmean(losses[-last:]) < (1 - drop) * losses[0]

"""The loss of a mini-batch along the direction of its gradient: how long a step may be before it does harm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnext.distributed import unwrap_model
from bnext.errors import Refusal, StatisticsError
from bnext.numbers import is_number
from bnext.probes.training_loss import compute_loss, list_trained, looking_at_training, number_batches
from bnext.scope.model import keeping_parameters
from bnext.seeding import derive_seed
from bnext.statistics.data_pass import Forward

__all__ = ["LossAlongGradient", "loss_along_gradient"]

_NO_SIZE = Refusal(
    StatisticsError, "step_sizes", "be numbers above 0", "Use learning rates, such as [0.001, 0.01, 0.1, 1.0]."
)


@dataclasses.dataclass(frozen=True, eq=False)
class LossAlongGradient:
    """Losses after a step of gradient descent of different sizes.

    Args:
        step_sizes: [K], as a learning rate.
        losses: before a step, of each mini-batch, [B].
        ratios: loss after a step / loss before it, [B, K]; not finite where the step leads so far.
        gradient_norms: length of the gradient over all trained parameters, [B].
    """

    step_sizes: Tensor
    losses: Tensor
    ratios: Tensor
    gradient_norms: Tensor

    @property
    def largest_good_steps(self) -> Tensor:
        """For each mini-batch the largest step size up to which every one lowers the loss, [B]; 0 where none does."""
        order = self.step_sizes.argsort()
        is_good = (self.ratios[:, order] < 1).long().cumprod(1)
        sizes = torch.cat([self.step_sizes.new_zeros(1), self.step_sizes[order]])
        return sizes[is_good.sum(1)]


def loss_along_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    step_sizes: Sequence[float],
    *,
    forward: Forward | None = None,
    seed: int = 0,
) -> LossAlongGradient:
    """Relative loss of mini-batches after one step along their gradient, for step sizes.

        r_bk = L_b(w - s_k grad L_b(w)) / L_b(w)

    Args:
        model: any torch model, a detector too: it returns a dictionary of losses, which are summed, or one loss.
        batches: as in training, with labels; a list of records each, for detectron2's models.
        step_sizes: s_k, above 0.
        forward: called as forward(model, batch), gives the losses; default model(batch).
        seed: 0 or more: of what is drawn, such as RoIs: the same for all steps of a batch.

    Raises:
        StatisticsError: a step size cannot be; no batch, no losses, or nothing is trained.

    Note:
        Norms normalize by mini-batch statistics, dropout is off. A loss that is not finite is a result. Afterwards,
        also after an exception, parameters, gradients, buffers, modes and random generators are bitwise as they were.
        No collectives but those of synchronized norms: each worker steps along the gradient of its own batch.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> def square(model, batch):
        ...     return model.weight.square().sum()
        >>> loss_along_gradient(model, [None], [0.25, 0.5], forward=square).ratios.tolist()
        [[0.25, 0.0]]

    Source:
        Bjorck, Gomes, Selman, Weinberger, *Understanding Batch Normalization*, 2018, figure 3.
    """
    where = "loss_along_gradient"
    step_sizes = [float(size) for size in step_sizes]
    if not step_sizes or not all(is_number(size) and size > 0 for size in step_sizes):
        raise _NO_SIZE.of(repr(step_sizes), where)

    model = unwrap_model(model)
    parameters = list(list_trained(model, where).values())
    losses: list[float] = []
    norms: list[float] = []
    ratios: list[list[float]] = []

    with keeping_parameters(model), looking_at_training(model):
        starts = [parameter.detach().clone() for parameter in parameters]
        for number, batch in number_batches(batches, where):
            drawn = derive_seed(seed, number)
            with torch.enable_grad():
                loss = compute_loss(model, batch, forward, drawn, where)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            losses.append(float(loss.detach()))
            norms.append(_measure_length(gradients))

            with torch.no_grad():
                ratios.append([])
                for size in step_sizes:
                    _step(parameters, starts, gradients, size)
                    after = float(compute_loss(model, batch, forward, drawn, where))
                    ratios[-1].append(after / losses[-1] if losses[-1] else math.nan)
                _step(parameters, starts, gradients, 0.0)

    tensors = [torch.tensor(values, dtype=torch.float64) for values in (step_sizes, losses, ratios, norms)]
    return LossAlongGradient(*tensors)


def _measure_length(gradients: Sequence[Tensor | None]) -> float:
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return math.sqrt(float(torch.stack(squares).sum()))


def _step(
    parameters: Sequence[Tensor], starts: Sequence[Tensor], gradients: Sequence[Tensor | None], size: float
) -> None:
    for parameter, start, gradient in zip(parameters, starts, gradients, strict=True):
        if size and gradient is not None:
            parameter.copy_(start - size * gradient)
        else:
            parameter.copy_(start)

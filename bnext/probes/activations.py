"""Mean and deviation of each channel of a model's layers, in the order of its depth."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnext.distributed import unwrap_model
from bnext.errors import Refusal, StatisticsError
from bnext.functional.moments import Moments, batch_moments, merge_moments, stack_parts
from bnext.probes.training_loss import looking_at_training, number_batches, run_batch
from bnext.seeding import derive_seed
from bnext.statistics.data_pass import Forward

__all__ = ["LayerActivations", "activations_by_depth"]

_NO_LAYER = Refusal(
    StatisticsError,
    "model",
    "run a layer of the kinds that are asked for, which returns a tensor [N, C, ...]",
    "Pass kinds= with classes of the model's own modules.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerActivations:
    """Statistics of a layer's output over all mini-batches, samples and positions.

    Args:
        layer: its path.
        means, deviations: of each channel, [C], float64; the latter with correction 0. Where an activation is not
            finite, neither are they.
        count: elements per channel.
    """

    layer: str
    means: Tensor
    deviations: Tensor
    count: int


@torch.no_grad()
def activations_by_depth(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    forward: Forward | None = None,
    seed: int = 0,
) -> list[LayerActivations]:
    """Mean and standard deviation of each channel of the layers' outputs, in the order in which they are first called.

    Args:
        model: any torch model, a detector too.
        batches: as in training, with labels; a list of records each, for detectron2's models.
        kinds: classes of the layers that are looked at. A layer that several levels share has all of them together.
        forward: called as forward(model, batch), runs the model; default model(batch).
        seed: 0 or more: of what is drawn, such as RoIs.

    Raises:
        StatisticsError: no batch, or no such layer has run.

    Note:
        In training mode, norms by mini-batch statistics, without dropout. Accumulated by merged moments in float64.
        Afterwards, also after an exception, buffers, modes and random generators are bitwise as they were. No
        collectives but those of synchronized norms.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
        >>> layers = activations_by_depth(model, [torch.randn(2, 3, 8, 8)])
        >>> [(each.layer, len(each.means), each.count) for each in layers]
        [('0', 4, 72), ('2', 5, 32)]

    Source:
        Bjorck, Gomes, Selman, Weinberger, *Understanding Batch Normalization*, 2018, figure 5.
    """
    model = unwrap_model(model)
    names = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    seen: dict[nn.Module, Moments] = {}

    with looking_at_training(model), _taking_outputs(list(names), seen):
        for number, batch in number_batches(batches, "activations_by_depth"):
            run_batch(model, batch, forward, derive_seed(seed, number), "activations_by_depth")
    if not seen:
        raise _NO_LAYER.of("none", "activations_by_depth")

    layers = []
    for module, moments in seen.items():
        layers.append(LayerActivations(names[module], moments.mean, moments.var.sqrt(), int(moments.count)))
    return layers


def _put_channels_second(module: nn.Module, output: Tensor) -> Tensor:
    """[N, C, positions]; a linear layer has its channels last."""
    if isinstance(module, nn.Linear):
        return output.flatten(1, -2).transpose(1, 2) if output.dim() > 2 else output.unsqueeze(2)
    return output.flatten(2) if output.dim() > 2 else output.unsqueeze(2)


@contextlib.contextmanager
def _taking_outputs(modules: Sequence[nn.Module], seen: dict[nn.Module, Moments]) -> Iterator[None]:
    def take(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.numel():
            return
        moments = batch_moments(_put_channels_second(module, output.detach().double()).cpu())
        before = seen.get(module)
        seen[module] = moments if before is None else merge_moments(stack_parts([before, moments]))

    handles = [module.register_forward_hook(take) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

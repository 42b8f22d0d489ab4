"""Gradients of single mini-batches: the spread of the elements of a weight's, and those of each image at an output."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnext.distributed import unwrap_model
from bnext.errors import ConfigError, Refusal, StatisticsError, list_few
from bnext.numbers import is_count, is_number
from bnext.probes.training_loss import compute_loss, list_trained, looking_at_training, number_batches
from bnext.seeding import derive_seed
from bnext.statistics.data_pass import Forward
from bnext.text import suggest

__all__ = ["GradientHistogram", "OutputGradients", "find_middle_weight", "gradient_histogram", "output_gradients"]

_UNKNOWN = Refusal(ConfigError, "{name}", "be the path of a {kind} of the model", "{remedy}")
_NO_PATHS = Refusal(ConfigError, "parameters", "be a list of paths, one or more", "Write ['backbone.0.weight'].")
_NO_BINS = Refusal(ConfigError, "num_bins", "be a whole number of 1 or more", "Use 101.")
_NO_LIMIT = Refusal(ConfigError, "limit", "be a number above 0, or None", "Use None: the largest element.")
_NO_OUTPUT = Refusal(
    StatisticsError,
    "layer",
    "be a module that returns one tensor [N, C, ...] with gradients, for the same samples in each call",
    "Choose a convolution or a linear layer that the loss depends on.",
)


# ---- of a weight


@dataclasses.dataclass(frozen=True, eq=False)
class GradientHistogram:
    """Spread of the elements of a parameter's gradient, those of all mini-batches together.

    Args:
        parameter: its path.
        edges: of the bins, [bins + 1], symmetric about 0.
        counts: elements in each bin, [bins]; those beyond the edges, and those that are not finite, in none.
        num_elements: finite ones.
        num_not_finite: the others.
        mean, deviation: of the finite elements, the latter with correction 0.
        largest: magnitude.
        excess_kurtosis: E[(g - mean)^4] / deviation^4 - 3: 0 of a normal distribution, 3 of a Laplace distribution,
            larger the heavier the tails; NaN where all elements are equal.
    """

    parameter: str
    edges: Tensor
    counts: Tensor
    num_elements: int
    num_not_finite: int
    mean: float
    deviation: float
    largest: float
    excess_kurtosis: float


def gradient_histogram(
    model: nn.Module,
    batches: Iterable[Any],
    parameters: Sequence[str] | None = None,
    *,
    num_bins: int = 101,
    limit: float | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> dict[str, GradientHistogram]:
    """Histograms of gradients of single mini-batches, in training mode.

        g_b = d loss(batch b) / d parameter,   all elements of g_1, g_2, ... in one histogram

    Args:
        model: any torch model, a detector too: it returns a dictionary of losses, which are summed, or one loss.
        batches: as in training, with labels; a list of records each, for detectron2's models.
        parameters: paths; None: the weight at mid depth, `find_middle_weight`.
        num_bins: of equal width.
        limit: of the bins, from -limit to limit; None: the largest magnitude of this parameter's gradients.
        forward: called as forward(model, batch), gives the losses; default model(batch).
        seed: 0 or more: of what is drawn, such as RoIs, the same for a batch in every call.

    Returns:
        Path -> histogram, float64 on the CPU.

    Raises:
        ConfigError: there is no such parameter, or it is not trained; `num_bins` or `limit` cannot be.
        StatisticsError: no batch, no losses, or nothing is trained.

    Note:
        Norms normalize by mini-batch statistics, dropout is off. Afterwards, also after an exception, buffers, modes,
        plain attributes, gradients and random generators are bitwise as they were. The gradients of the chosen
        parameters are held for all batches. No collectives but those of synchronized norms: each worker sees its own
        batches.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> def loss_of(model, batch):
        ...     return model(batch).square().mean()
        >>> (histogram,) = gradient_histogram(model, [torch.randn(2, 3, 8, 8)], forward=loss_of).values()
        >>> histogram.parameter, int(histogram.counts.sum())
        ('0.weight', 108)

    Source:
        Bjorck, Gomes, Selman, Weinberger, *Understanding Batch Normalization*, 2018, figure 2.
    """
    if not is_count(num_bins, 1):
        raise _NO_BINS.of(repr(num_bins), "gradient_histogram")
    if limit is not None and not (is_number(limit) and limit > 0):
        raise _NO_LIMIT.of(repr(limit), "gradient_histogram")

    model = unwrap_model(model)
    trained = list_trained(model, "gradient_histogram")
    if isinstance(parameters, str) or (parameters is not None and not parameters):
        raise _NO_PATHS.of(repr(parameters), "gradient_histogram")
    names = [find_middle_weight(model)] if parameters is None else list(dict.fromkeys(parameters))
    for name in names:
        _check_path(name, "parameters", "parameter that is trained", trained, "gradient_histogram")
    chosen = [trained[name] for name in names]

    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.enable_grad(), looking_at_training(model):
        for number, batch in number_batches(batches, "gradient_histogram"):
            loss = compute_loss(model, batch, forward, derive_seed(seed, number), "gradient_histogram")
            gradients = torch.autograd.grad(loss, chosen, allow_unused=True)
            for name, parameter, gradient in zip(names, chosen, gradients, strict=True):
                known = torch.zeros_like(parameter) if gradient is None else gradient
                seen[name].append(known.detach().flatten().double().cpu())

    return {name: _count(name, torch.cat(elements), num_bins, limit) for name, elements in seen.items()}


def find_middle_weight(model: nn.Module) -> str:
    """The path of the weight at mid depth: of the trained parameters with two or more dimensions, the middle one.

    Args:
        model: whose modules are in the order of its depth.

    Raises:
        StatisticsError: nothing is trained.
        ConfigError: no trained parameter has two dimensions.
    """
    trained = list_trained(unwrap_model(model), "find_middle_weight")
    weights = [name for name, parameter in trained.items() if parameter.dim() >= 2]
    if not weights:
        rule, remedy = "have a trained weight of two or more dimensions", "Name the parameters instead."
        raise ConfigError.of("model", rule, got=list_few(trained), where="find_middle_weight", remedy=remedy)
    return weights[len(weights) // 2]


def _count(name: str, elements: Tensor, num_bins: int, limit: float | None) -> GradientHistogram:
    finite = elements[elements.isfinite()]
    mean = float(finite.mean()) if len(finite) else math.nan
    largest = float(finite.abs().max()) if len(finite) else math.nan

    moved = finite - mean
    var = float(moved.square().mean()) if len(finite) else math.nan
    kurtosis = float((moved / math.sqrt(var)).pow(4).mean()) - 3 if var > 0 else math.nan

    bound = limit or (largest if largest > 0 else 1.0)
    edges = torch.linspace(-bound, bound, num_bins + 1, dtype=torch.float64)
    counts = torch.histogram(finite, edges).hist.long()
    return GradientHistogram(
        parameter=name,
        edges=edges,
        counts=counts,
        num_elements=len(finite),
        num_not_finite=len(elements) - len(finite),
        mean=mean,
        deviation=math.sqrt(var),
        largest=largest,
        excess_kurtosis=kurtosis,
    )


# ---- of an output


@dataclasses.dataclass(frozen=True, eq=False)
class OutputGradients:
    """Gradient of each unit of a layer's output, for each image.

    Args:
        layer: its path.
        values: [N, C], images of all batches one below the other.
    """

    layer: str
    values: Tensor

    @property
    def mean(self) -> Tensor:
        """Over images, [C]."""
        return self.values.mean(0)

    @property
    def agreement(self) -> float:
        """Share of the gradients that is left when those of all images are added: sum_c |sum_n g| / sum_cn |g|.

        1 where every image pushes each unit the same way, about 1 / sqrt(N) where signs are at random, NaN without
        gradients.
        """
        together, each = self.values.sum(0).abs().sum(), self.values.abs().sum()
        return float(together / each) if each > 0 else math.nan


def output_gradients(
    model: nn.Module, batches: Iterable[Any], layer: str, *, forward: Forward | None = None, seed: int = 0
) -> OutputGradients:
    """Gradient of the loss with respect to each output unit of a layer, image by image, in training mode.

        g_nc = sum over positions and calls of  d loss(batch) / d output_nc

    Args:
        model, batches, forward, seed: see `gradient_histogram`.
        layer: path of a module that returns a tensor [N, C, ...], such as the last layer of a classifier. In a head
            that several levels share, the calls of one batch are added.

    Returns:
        Gradients as the loss has them: for a mean over N images, 1 / N of each image's own. Float64 on the CPU.

    Raises:
        ConfigError: there is no such module.
        StatisticsError: it returns no such tensor, or calls of one batch have different N; no batch, no losses.

    Note:
        As of `gradient_histogram`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> def loss_of(model, batch):
        ...     return nn.functional.cross_entropy(model(batch), torch.tensor([0, 2]))
        >>> gradients = output_gradients(model, [torch.randn(2, 3, 2, 2)], "1", forward=loss_of)
        >>> gradients.values.shape, round(abs(float(gradients.values.sum())), 6)
        (torch.Size([2, 3]), 0.0)

    Source:
        Bjorck, Gomes, Selman, Weinberger, *Understanding Batch Normalization*, 2018, figure 6.
    """
    model = unwrap_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_path(layer, "layer", "module", modules, "output_gradients")

    rows = []
    with torch.enable_grad(), looking_at_training(model):
        for number, batch in number_batches(batches, "output_gradients"):
            with _keeping_outputs(modules[layer]) as outputs:
                loss = compute_loss(model, batch, forward, derive_seed(seed, number), "output_gradients")

            _check_outputs(outputs, layer)
            gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
            calls = [gradient for gradient in gradients if gradient is not None]
            if not calls:
                raise _NO_OUTPUT.of("an output that the loss does not depend on", layer)
            sums = [_sum_positions(modules[layer], call.detach().double()) for call in calls]
            rows.append(torch.stack(sums).sum(0).cpu())

    return OutputGradients(layer, torch.cat(rows))


def _sum_positions(module: nn.Module, gradient: Tensor) -> Tensor:
    """[N, C]; a linear layer has its channels last."""
    if gradient.dim() == 2:
        return gradient
    return gradient.flatten(1, -2).sum(1) if isinstance(module, nn.Linear) else gradient.flatten(2).sum(2)


@contextlib.contextmanager
def _keeping_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Outputs of a module in this scope; the model goes on with copies, which it may change in place."""
    outputs: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        outputs.append(output)
        return output.clone() if isinstance(output, Tensor) else output

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _check_outputs(outputs: Sequence[Any], layer: str) -> None:
    shapes = set()
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.requires_grad:
            raise _NO_OUTPUT.of(type(output).__name__, layer)
        shapes.add(tuple(output.shape[:2]))
    if len(shapes) != 1:
        raise _NO_OUTPUT.of(f"[N, C] of {list_few(sorted(shapes))}" if shapes else "no call", layer)


def _check_path(name: str, argument: str, kind: str, allowed: Iterable[str], where: str) -> None:
    """Raise ConfigError unless a path is one of those that are allowed."""
    allowed = list(allowed)
    if name not in allowed:
        remedy = suggest(name, allowed) or f"The model has {list_few(path for path in allowed if path)}."
        raise _UNKNOWN.of(repr(name), where, name=argument, kind=kind, remedy=remedy)

"""The arithmetic of folding one norm into one convolution, and whether it is what the two compute.

Nothing is changed here (see `bnext.surgery.fold`).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bnext.errors import ConfigError, StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.ownership import check_statistics
from bnext.surgery.fold_pairs import Conv, Pair

__all__ = ["FoldPlan", "choose_domain", "find_difference", "make_plan"]

# Relative, in float64: what a module computes on a probe agrees with its formula, or means something else.
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class FoldPlan:
    """A pair, the norm's scale and shift [C], and the folded parameters; all in float64 on the CPU."""

    pair: Pair
    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor


def choose_domain(norm: BatchNorm2d, path: str, domain: str | None) -> str:
    """The domain to fold a norm for; "" where all share everything."""
    if not any(answer.startswith("per_") for answer in (norm.spec.population, norm.spec.affine)):
        return ""
    name = norm.domains[0] if domain is None and len(norm.domains) == 1 else domain
    if name not in norm.domains:
        names = ", ".join(repr(known) for known in norm.domains)
        raise ConfigError(
            f"domain must be one of {names}, whose statistics or affine differ; got {domain!r} ({path}). Choose one: "
            f"fold_norms(model, {norm.domains[0]!r}); a folded model serves a single one."
        )
    return name


def make_plan(pair: Pair, domain: str | None) -> FoldPlan:
    """What a norm and its convolution become for one domain.

    Raises:
        ConfigError: no domain is chosen where there are several, or an unknown one.
        StatisticsError: statistics that are missing, not finite or negative; a folded parameter that is
            not finite in the type of the convolution.
    """
    population, affine = _find_states(pair.norm, pair.norm_path, domain)
    mean, var = _to_double(population.running_mean), _to_double(population.running_var)
    check_statistics(mean, var, pair.norm_path, "; nothing was folded")
    gamma = torch.ones_like(mean) if affine.weight is None else _to_double(affine.weight)
    beta = torch.zeros_like(mean) if affine.bias is None else _to_double(affine.bias)
    eps: Any = pair.norm.eps
    scale = gamma * (var + eps).rsqrt()
    shift = beta - mean * scale
    old_bias = torch.zeros_like(mean) if pair.conv.bias is None else _to_double(pair.conv.bias)
    weight, bias = _scale_weight(pair.conv, scale), old_bias * scale + shift
    for name, value in (("weight", weight), ("bias", bias)):
        if not torch.isfinite(value.to(pair.conv.weight.dtype)).all():
            raise StatisticsError(
                f"a folded {name} must be finite in {pair.conv.weight.dtype}; got one that is not "
                f"({pair.conv_path} with {pair.norm_path}). Fold the model in float32; nothing was folded."
            )
    return FoldPlan(pair, scale, shift, weight, bias)


def _find_states(norm: Any, path: str, domain: str | None) -> tuple[Any, Any]:
    """The modules that hold the population statistics and the affine of a norm, for one domain."""
    population = affine = norm
    if isinstance(norm, BatchNorm2d):
        name = choose_domain(norm, path, domain)
        population, affine = norm.population_state(name), norm.affine_state(name)
    if population.running_mean is None:
        raise StatisticsError(
            f"a norm to fold must keep population statistics; got none ({path}). Use a norm that keeps them, and "
            f"estimate them with recompute_population_statistics; or fold the parts of the model without it."
        )
    return population, affine


def _scale_weight(conv: Conv, scale: Tensor) -> Tensor:
    """Output channels are the first axis of a convolution's weight, the second of a transposed one's, in its group."""
    weight = _to_double(conv.weight)
    if not conv.transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = weight.unflatten(0, (conv.groups, -1))  # [groups, in channels, out channels, ...] of each group
    scaled = groups * scale.reshape(conv.groups, 1, -1, *[1] * (weight.dim() - 2))
    return scaled.flatten(0, 1)


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # first to the CPU: not every device has float64


# ---- trying out


def find_difference(plan: FoldPlan) -> str | None:
    """Why the pair's own forward differs from the formula, on a probe of noise; None where it does not."""
    try:
        if not isinstance(plan.pair.norm, BatchNorm2d) and not _is_scale_and_shift(plan):
            return "it does more, or other, than to normalize by its running statistics"
        if not _is_convolution(plan):
            return "its convolution does more before the norm than to convolve (an activation?)"
    except Exception as error:  # modules of others may need what a probe has not
        reason = "".join(str(error).splitlines()[:1])
        return f"it or its convolution cannot be tried out on noise: {type(error).__name__}: {reason}"
    return None


def _is_scale_and_shift(plan: FoldPlan) -> bool:
    num_axes = plan.pair.conv.weight.dim() - 2
    probe = _make_noise(4, len(plan.scale), *[2] * num_axes)
    output = functional_call(plan.pair.norm, _get_double_state(plan.pair.norm), (probe,))
    return _agree(output, _ScaleAndShift(plan)(probe))


def _is_convolution(plan: FoldPlan) -> bool:
    conv = plan.pair.conv
    padding = [0] * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    sides = [1 + step * (size - 1) for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    probe = _make_noise(2, conv.in_channels, *(side + pad + 1 for side, pad in zip(sides, padding, strict=True)))
    state = _get_double_state(conv)
    before = _clone(conv, state.get("weight"), state.get("bias"), plan.pair.norm, _ScaleAndShift(plan))
    after = _clone(conv, plan.weight, plan.bias, plan.pair.norm, nn.Identity())
    expected = before(probe) if plan.pair.is_own else _ScaleAndShift(plan)(before(probe))
    return _agree(after(probe), expected)


def _clone(conv: Conv, weight: Tensor | None, bias: Tensor | None, norm: nn.Module, stand_in: nn.Module) -> Conv:
    """The same layer with other parameters, and another module in the place of its norm."""
    clone = copy.copy(conv)
    values = {"weight": weight, "bias": bias}
    clone._parameters = {
        name: None if value is None else nn.Parameter(value, requires_grad=False) for name, value in values.items()
    }
    clone._modules = {
        name: stand_in if child is norm else copy.deepcopy(child).double().cpu() if child is not None else None
        for name, child in conv._modules.items()
    }
    return clone


class _ScaleAndShift(nn.Module):
    def __init__(self, plan: FoldPlan) -> None:
        super().__init__()
        self.scale, self.shift = plan.scale, plan.shift

    def forward(self, input: Tensor) -> Tensor:
        shape = (-1, *[1] * (input.dim() - 2))
        return input * self.scale.reshape(shape) + self.shift.reshape(shape)


def _get_double_state(module: nn.Module) -> dict[str, Tensor]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: _to_double(value) if value.is_floating_point() else value.cpu() for name, value in tensors}


def _make_noise(num_samples: int, *shape: int) -> Tensor:
    """Samples of noise, in turn small and so large that no bias hides an activation."""
    noise = torch.randn(num_samples, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise[1::2] *= 1e4
    return noise


@torch.no_grad()
def _agree(output: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding, relative to each sample's largest value."""
    if output.shape != expected.shape:
        return False
    difference, size = ((value.flatten(1).abs().amax(1)) for value in (output - expected, expected))
    return bool((difference <= _TOLERANCE * size).all())

"""Outputs, gradients and running statistics on a device against those in float64 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnext.proofs.cases import CASES, DTYPES, LAYOUTS, Case
from bnext.proofs.check import Check

__all__ = ["TOLERANCE", "list_parity_checks", "measure_difference", "measure_parity", "step"]

# Of the largest number of a tensor. A half type's own rounding is 5e-4, that of bfloat16 4e-3; gradients of a cube have
# several of them.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Mean by standard deviation -> what float32 may lose at it: the features themselves are rounded by 6e-8 of their mean.
FAR_FROM_ZERO = {1e3: 1e-3, 1e4: 1e-2}
QUICK = ("plain", "ghost", "domains", "row 1")  # to try the checks themselves

Call = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


def list_parity_checks(quick: bool = False) -> list[Check]:
    """Every case in three types, each in two memory formats and both modes; then features far from zero."""
    checks = []
    for dtype in DTYPES[:1] if quick else DTYPES:
        for name, case in CASES.items():
            if not quick or name in QUICK:
                measure = partial(_measure_case, case, dtype)
                checks.append(Check(f"parity, {str(dtype)[6:]}", name, measure, TOLERANCE[dtype]))

    for ratio, limit in FAR_FROM_ZERO.items():
        for name in ("plain", "ghost", "row 1"):
            measure = partial(_measure_far_from_zero, CASES[name], ratio)
            checks.append(Check("parity, far from zero", f"{name}, mean/std {ratio:g}", measure, limit))
    return checks


def _measure_case(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference in both modes and both memory formats."""
    errors = []
    for layout in LAYOUTS.values():
        features = case.draw(dtype, layout)
        errors += [measure_parity(case.build, case.call, features, device, training) for training in (True, False)]
    return max(errors)


def _measure_far_from_zero(case: Case, ratio: float, device: torch.device) -> float:
    errors = []
    for layout in LAYOUTS.values():
        features = case.draw(torch.float32, layout, ratio)
        errors.append(measure_parity(case.build, case.call, features, device, training=True, outputs_alone=True))
    return max(errors)


def measure_parity(
    build: Callable[[], Any],
    call: Call,
    features: Mapping[str, Tensor],
    device: torch.device,
    training: bool,
    outputs_alone: bool = False,
) -> float:
    """The largest difference between a step on a device and the same in float64 on a CPU.

    Args:
        build: a norm with the same state every time, on a CPU.
        call: called as call(norm, features), gives outputs by name.
        features: on a CPU, in the type and memory format that the device gets them in.
        device: whose numbers are asked.
        training: the mode.
        outputs_alone: whether gradients and statistics are left out.

    Returns:
        Of the largest number of each tensor; infinity, where a shape, type or memory format is another.
    """
    expected = step(build().double().train(training), call, {name: x.double() for name, x in features.items()})
    actual = step(build().to(device).train(training), call, {name: x.to(device) for name, x in features.items()})
    if outputs_alone:
        expected = {name: value for name, value in expected.items() if name.startswith("output")}

    for name, feature in features.items():
        for value in (actual[f"output {name}"], actual[f"gradient {name}"]):
            if value.dtype != feature.dtype or value.device.type != device.type or not _has_format(value, feature):
                return float("inf")
    return measure_difference(actual, expected)


def _has_format(value: Tensor, feature: Tensor) -> bool:
    layouts = [layout for layout in LAYOUTS.values() if feature.is_contiguous(memory_format=layout)]
    return value.shape == feature.shape and all(value.is_contiguous(memory_format=layout) for layout in layouts)


def step(norm: Any, call: Call, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, gradients and state after a forward and backward of their cubes."""
    inputs = {name: feature.detach().requires_grad_() for name, feature in features.items()}
    outputs = call(norm, inputs)
    sum((output.double() ** 3).sum() for output in outputs.values()).backward()  # type: ignore[union-attr]

    numbers = {f"output {name}": output.detach() for name, output in outputs.items()}
    for name, feature in inputs.items():
        numbers[f"gradient {name}"] = feature.grad  # type: ignore[assignment]
    for name, parameter in norm.named_parameters():
        if parameter.grad is not None:
            numbers[f"gradient {name}"] = parameter.grad
    for name, buffer in norm.named_buffers():
        numbers[f"buffer {name}"] = buffer
    return numbers


def measure_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of tensors by name, each by the largest number of the expected one; NaN is infinite."""
    worst = 0.0
    for name, right in expected.items():
        right = right.detach().cpu().double()
        difference = (actual[name].detach().cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-3)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst

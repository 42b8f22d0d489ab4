"""Norms of every kind on odd inputs: sizes, types, scales, offsets, layouts, values that are not finite.

Outputs, gradients and running statistics are compared with the slow float64 definition. What the definition has no
answer for, a mini-batch of one element, must be refused as that; what is not finite must not stay in a norm.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnext.errors import BNextError, StatisticsError
from tests.cases import CASES, Case, make_features
from tests.faults.attempt import Attempt, Outcome, Verdict
from tests.layers.test_batch_norm_parity import actual_populations, expect_outputs, expect_populations

__all__ = ["make_attempts"]

LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")
SPECIAL = (None, None, None, "nan", "inf", "-inf")
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Input:
    """The features of a call, as they are made."""

    sizes: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    scale: float
    offset: float  # in standard deviations
    layout: str
    special: str | None  # a value in one element
    seed: int

    def make(self, case: Case) -> dict[str, Tensor]:
        features = make_features(self.seed, self.sizes, torch.float64, names=case.names)
        features = {name: ((x + self.offset) * self.scale).to(self.dtype) for name, x in features.items()}
        for x in features.values():
            if self.special and x.numel():
                x[0, 1, 0, 0] = float(self.special)
                break
        return {name: _lay_out(x, self.layout) for name, x in features.items()}


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout of memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, dim=3)[..., ::2]
    if layout == "expanded" and x.shape[0]:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """Attempts drawn from a seed."""
    draw = np.random.default_rng(seed)
    names = [str(param.id) for param in CASES]
    cases = [param.values[0] for param in CASES]

    attempts = []
    for number in range(count):
        index = int(draw.integers(len(cases)))
        case, training = cases[index], bool(draw.integers(4))
        given = _draw_input(draw, case, number)
        mode = "training" if training else "evaluation"
        name = f"{names[index]} in {mode}, {given}"
        attempts.append(Attempt(name, partial(_compare, case, given, training), seconds=60))
    return attempts


def _draw_input(draw: np.random.Generator, case: Case, seed: int) -> Input:
    num_samples = len(case.active) if isinstance(case.active, tuple) else int(draw.choice([0, 1, 2, 3, 5]))
    sides = draw.choice([1, 1, 2, 3, 7], size=(len(case.names), 2))
    sizes = tuple((num_samples, int(h), int(w)) for h, w in sides)
    dtype = (torch.float64, torch.float32, torch.float16, torch.bfloat16)[int(draw.integers(4))]
    is_half = dtype in (torch.float16, torch.bfloat16)

    scale = 10.0 ** int(draw.integers(-1, 2) if is_half else draw.integers(-4, 5))
    offset = float(draw.choice([0, 10] if is_half else [0, 10, 1000, -10000]))
    layout, special = LAYOUTS[int(draw.integers(4))], SPECIAL[int(draw.integers(len(SPECIAL)))]
    return Input(sizes, dtype, scale, offset, layout, special, seed)


def _compare(case: Case, given: Input, training: bool, folder: Path) -> Outcome:
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    norm = case.build(dtype).train(training)
    inputs = given.make(case)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    wide = {name: x.double().requires_grad_() for name, x in inputs.items()}

    is_empty = not any(x.numel() for x in inputs.values())
    expected, populations = (wide, {}) if is_empty else _define(case, norm, wide, training)
    norm.to(dtype)

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    try:
        outputs = case.call(norm, leaves)
    except BNextError as error:
        return _judge_refusal(case, norm, inputs, before, error)

    if given.special:
        return _judge_what_stays(norm, before, training)
    if expected is None:
        return Outcome(Verdict.WRONG, "an output where there is no definition")
    if is_empty and any(not torch.equal(value, before[key]) for key, value in norm.state_dict().items()):
        return Outcome(Verdict.WRONG, "moved by nothing")
    return _judge_numbers(case, norm, given, (leaves, outputs), (wide, expected), populations)


def _define(
    case: Case, norm: torch.nn.Module, wide: dict[str, Tensor], training: bool
) -> tuple[dict[str, Tensor] | None, dict[str, tuple[Tensor, Tensor, int]]]:
    """Outputs and populations by the slow definition; None: it has none, as a mini-batch has a single element."""
    try:
        expected = expect_outputs(case, norm.double(), wide, training)
    except AssertionError:
        return None, {}
    return expected, expect_populations(case, norm, wide) if training else {}


def _judge_refusal(
    case: Case, norm: torch.nn.Module, inputs: dict[str, Tensor], before: dict[str, Tensor], error: BNextError
) -> Outcome:
    """Right for mini-batches of one element alone, and nothing is changed."""
    moved = [key for key, value in norm.state_dict().items() if not torch.equal(value, before[key])]
    if moved:
        return Outcome(Verdict.WRONG, f"refused, and yet changed {moved}")

    batches = case.mini_batches_of(inputs, norm.training)
    elements: dict[object, int] = {}
    samples = [x[0].numel() for name in case.names for x in inputs[name]]
    for key, number in zip(batches, samples, strict=True):
        elements[key] = elements.get(key, 0) + number
    is_alone = 1 in elements.values()
    if isinstance(error, StatisticsError) and is_alone and "1" in str(error):
        return Outcome(Verdict.REFUSED, str(error))
    return Outcome(Verdict.BLAMED, f"{type(error).__name__}: {error}")


def _judge_what_stays(norm: torch.nn.Module, before: dict[str, Tensor], training: bool) -> Outcome:
    """An input that is not finite leaves no trace."""
    state = norm.state_dict()
    spoiled = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if spoiled:
        return Outcome(Verdict.WRONG, f"not finite afterwards: {spoiled}")
    moved = [key for key, value in state.items() if not torch.equal(value, before[key])]
    if moved and not training:
        return Outcome(Verdict.WRONG, f"moved in evaluation: {moved}")
    return Outcome(Verdict.RIGHT)


def _judge_numbers(
    case: Case,
    norm: torch.nn.Module,
    given: Input,
    actual: tuple[dict[str, Tensor], dict[str, Tensor]],
    right: tuple[dict[str, Tensor], dict[str, Tensor]],
    populations: dict[str, tuple[Tensor, Tensor, int]],
) -> Outcome:
    """Outputs, gradients and running statistics against the definition.

    The error that rounding the inputs alone would cause grows with the mean in standard deviations. It is measured
    against the largest output, and a gradient against what one element's would be.
    """
    (leaves, outputs), (wide, expected) = actual, right
    tolerance = 50 * ROUNDING[given.dtype] * _condition(case, wide, norm.training)

    for name, output in outputs.items():
        if output.dtype != given.dtype:
            return Outcome(Verdict.WRONG, f"the output is {output.dtype}")
        error = _distance(output, expected[name]) / _size(expected[name], 1.0)
        if error > tolerance:
            return Outcome(Verdict.WRONG, f"outputs of {name} differ by {error:.1e}, more than {tolerance:.1e}")

    weights = {name: torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for name, x in outputs.items()}
    if any(x.requires_grad for x in outputs.values()) and any(x.numel() for x in outputs.values()):
        gradients = _differentiate(outputs, leaves, weights)
        slow = _differentiate(expected, wide, weights)
        for name, gradient in gradients.items():
            error = _distance(gradient, slow[name]) / _size(slow[name], 1 / max(given.scale, 3e-3))
            if error > 20 * tolerance:
                return Outcome(
                    Verdict.WRONG, f"gradients of {name} differ by {error:.1e}, more than {20 * tolerance:.1e}"
                )

    for owner, values in actual_populations(case, norm, populations).items():
        mean, var, number = populations[owner]
        scale = max(1.0, given.scale)
        error = max(_distance(values[0], mean) / scale, _distance(values[1], var) / scale**2)
        if error > tolerance or values[2] != number:
            return Outcome(Verdict.WRONG, f"population of {owner!r} differs by {error:.1e}, {values[2]} updates")
    return Outcome(Verdict.RIGHT)


def _condition(case: Case, features: dict[str, Tensor], training: bool) -> float:
    """By how much a mini-batch enlarges the rounding of its values: the largest of them in standard deviations."""
    samples = [x.detach() for name in case.names for x in features[name]]
    members: dict[object, list[Tensor]] = {}
    for key, x in zip(case.mini_batches_of(features, training), samples, strict=True):
        members.setdefault(key, []).append(x.flatten(1))

    condition = 1.0
    for parts in members.values():
        rows = torch.cat(parts, dim=1)
        spread = rows.std(1, correction=0).clamp(min=1e-3)
        condition = max(condition, float((rows.abs().amax(1) / spread).max()))
    return condition


def _differentiate(
    outputs: dict[str, Tensor], leaves: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    loss = sum((x.double() * weights[name].double()).sum() for name, x in outputs.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {name: torch.zeros_like(x) if gradient is None else gradient for (name, x), gradient in pairs}


def _size(right: Tensor, least: float) -> float:
    return max(least, float(right.detach().abs().max())) if right.numel() else least


def _distance(actual: Tensor, right: Tensor) -> float:
    """The largest difference; infinite where one has a number and the other none."""
    difference = (actual.detach().double() - right.detach()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0

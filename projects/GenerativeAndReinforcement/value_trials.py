"""Value nets with batch norm, learned by Q-learning with a target net: whose moments normalize the target.

The target net gets the weights of the trained net every so many steps. Its moments are those of moving averages, which
lag behind weights that change and visited states that move on; moments that nobody has copied; or precise ones.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from grid_world import NUM_ACTIONS, GridWorld
from torch import Tensor, nn
from torch.optim import Adam

from bnext.errors import ConfigError
from bnext.progress import track
from bnext.scope import frozen_statistics
from bnext.scope.model import restoring
from bnext.statistics import recompute_population_statistics

__all__ = ["TARGETS", "ValueSetting", "list_value_trials"]

# Way -> (momentum of the moving averages, words).
TARGETS = {
    "no_norm": (None, "no norm"),
    "precise": (0.1, "precise: re-estimated when the weights are copied"),
    "moving_average": (0.1, "moving averages, momentum 0.1"),
    "slow_average": (0.001, "moving averages, momentum 0.001"),
    "not_copied": (0.1, "weights are copied, moving averages are not"),
    "mini_batch": (0.1, "mini-batch of the next states"),
}


@dataclasses.dataclass(frozen=True)
class ValueSetting:
    """Common settings of the trainings of value nets.

    Args:
        steps: of Adam, at least 4.
        batch_size: transitions of a step.
        learning_rate: of Adam.
        period: steps between copies of the weights to the target net.
        exploration: share of random actions.
        channels: of the convolutions.
        num_estimated: states of a precise estimate.
        discount: of a step.
    """

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 0.001
    period: int = 50
    exploration: float = 0.3
    channels: int = 32
    num_estimated: int = 1024
    discount: float = 0.9

    def __post_init__(self) -> None:
        for name, least in (("steps", 4), ("batch_size", 2), ("period", 1), ("channels", 1), ("num_estimated", 2)):
            _check(name, getattr(self, name), f"be {least} or more", getattr(self, name) >= least)
        _check("learning_rate", self.learning_rate, "be above 0", 0 < self.learning_rate < math.inf)
        _check("exploration", self.exploration, "be from 0 to 1", 0 <= self.exploration <= 1)
        _check("discount", self.discount, "be above 0 and below 1", 0 < self.discount < 1)


def _check(name: str, value: float, rule: str, is_right: bool) -> None:
    if not is_right:
        raise ConfigError.of(name, rule, got=value, where="settings of the value nets", remedy="Correct it.")


def list_value_trials(setting: ValueSetting) -> dict[str, Callable[[int], Mapping[str, Any]]]:
    """Way of `TARGETS` -> training, a function of the seed."""
    world = GridWorld(setting.discount)
    return {way: partial(_train_and_read, setting, world, way) for way in TARGETS}


def build_value_net(channels: int, momentum: float | None) -> nn.Sequential:
    """Planes [N, 2, 8, 8] -> values [N, actions]; without a momentum it has no norm."""
    layers: list[nn.Module] = []
    before = 2
    for _ in range(3):
        layers.append(nn.Conv2d(before, channels, 3, padding=1))
        layers += [] if momentum is None else [nn.BatchNorm2d(channels, momentum=momentum)]
        layers.append(nn.ReLU())
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * channels, NUM_ACTIONS))


class Memory:
    """Transitions that were met, the oldest of which are forgotten.

    Args:
        size: most of them.
    """

    def __init__(self, size: int = 10_000) -> None:
        self.size = size
        self.before = self.after = torch.empty(0, 2, dtype=torch.long)
        self.actions = torch.empty(0, dtype=torch.long)
        self.is_end = torch.empty(0, dtype=torch.bool)

    def add(self, before: Tensor, actions: Tensor, after: Tensor, is_end: Tensor) -> None:
        """Take in transitions: states [N, 2], actions [N], states [N, 2], whether the episode ended [N]."""
        self.before = torch.cat([self.before, before])[-self.size :]
        self.actions = torch.cat([self.actions, actions])[-self.size :]
        self.after = torch.cat([self.after, after])[-self.size :]
        self.is_end = torch.cat([self.is_end, is_end])[-self.size :]

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Indices of transitions at random, [N]."""
        return torch.randint(len(self.actions), (number,), generator=generator)


def _train_and_read(setting: ValueSetting, world: GridWorld, way: str, seed: int) -> dict[str, Any]:
    """Train a value net by targets of a way, and compare it with the optimal values of all states.

    Returns:
        {"curve": share of states with a best action in %, at each quarter, "value_error": mean |Q - Q*| at the end,
        "target_error": mean difference of targets from those by precise moments, "staleness": distance of the target
        net's moments from precise ones in standard deviations, both of them right before the target net is renewed}.
    """
    generator = torch.Generator().manual_seed(seed)
    momentum, _ = TARGETS[way]
    model = build_value_net(setting.channels, momentum)
    target = copy.deepcopy(model).eval()
    optimizer = Adam(model.parameters(), lr=setting.learning_rate)
    memory, pairs = Memory(), world.draw_pairs(setting.batch_size, generator)
    curve: list[float] = []
    errors: list[float] = []
    staleness: list[float] = []

    for step in track(range(setting.steps), "Q-learning", setting.steps, "step"):
        pairs = _walk(setting, world, model, pairs, memory, generator)
        if step % setting.period == 0:
            states = world.show(memory.after[memory.draw(setting.num_estimated, generator)])
            _renew(target, model, way, states)
        if (step + 1) % setting.period == 0 and momentum is not None:
            states = world.show(memory.after[memory.draw(setting.num_estimated, generator)])
            error, distance = _measure_staleness(target, way, states)
            errors.append(setting.discount * error)
            staleness.append(distance)

        index = memory.draw(setting.batch_size, generator)
        wanted = _compute_targets(setting, world, target, way, memory, index)
        values = model.train()(world.show(memory.before[index]))
        loss = F.smooth_l1_loss(values.gather(1, memory.actions[index, None])[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if (step + 1) % (setting.steps // 4) == 0:
            share, value_error = _compare_with_best(world, model)
            curve.append(share)

    numbers: dict[str, Any] = {"curve": curve, "value_error": value_error}
    if errors:
        numbers |= {"target_error": sum(errors) / len(errors), "staleness": sum(staleness) / len(staleness)}
    return numbers


@torch.no_grad()
def _walk(
    setting: ValueSetting,
    world: GridWorld,
    model: nn.Module,
    pairs: Tensor,
    memory: Memory,
    generator: torch.Generator,
) -> Tensor:
    """One step of all copies, mostly by the best action as the net sees it; who has arrived begins anew."""
    actions = model.eval()(world.show(pairs)).argmax(1)
    at_random = torch.rand(len(pairs), generator=generator) < setting.exploration
    drawn = torch.randint(NUM_ACTIONS, (len(pairs),), generator=generator)
    actions = torch.where(at_random, drawn, actions)

    after, is_end = world.step(pairs, actions)
    memory.add(pairs, actions, after, is_end)
    begins = is_end | (torch.rand(len(pairs), generator=generator) < 0.02)  # else some would never arrive
    return torch.where(begins[:, None], world.draw_pairs(len(pairs), generator), after)


def _renew(target: nn.Module, model: nn.Module, way: str, states: Tensor) -> None:
    """Copy the weights to the target net, and what belongs to its way."""
    with torch.no_grad():
        for copied, parameter in zip(target.parameters(), model.parameters(), strict=True):
            copied.copy_(parameter)
        if way == "not_copied":
            return
        for copied, buffer in zip(target.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)
    if way == "precise":
        recompute_population_statistics(target, states.split(256))


@torch.no_grad()
def _compute_values(target: nn.Module, way: str, states: Tensor) -> Tensor:
    """Largest value [N] of states, as the target net of a way sees it."""
    with restoring(target), frozen_statistics(target):
        return target.train(way == "mini_batch")(states).amax(1)


def _compute_targets(
    setting: ValueSetting, world: GridWorld, target: nn.Module, way: str, memory: Memory, index: Tensor
) -> Tensor:
    """Targets [N] of transitions: the reward, or the discounted value of the state after."""
    values = _compute_values(target, way, world.show(memory.after[index]))
    return torch.where(memory.is_end[index], torch.ones(()), setting.discount * values)


def _measure_staleness(target: nn.Module, way: str, states: Tensor) -> tuple[float, float]:
    """Mean difference of values from those by precise moments, and of means from precise ones in deviations."""
    seen = torch.cat([_compute_values(target, way, part) for part in states.split(64)])
    precise = copy.deepcopy(target)
    report = recompute_population_statistics(precise, states.split(256))
    values = _compute_values(precise, "precise", states)
    distance = sum(estimate.mean_shift for estimate in report.reached) / len(report.reached)
    return float((seen - values).abs().mean()), distance


@torch.no_grad()
def _compare_with_best(world: GridWorld, model: nn.Module) -> tuple[float, float]:
    """Share of all states whose action is a best one, in %, and the mean error of values; by precise moments."""
    with restoring(model):
        states = world.show(world.pairs)
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            recompute_population_statistics(model, states.split(256))
        values = torch.cat([model.eval()(part) for part in states.split(512)])

    best = world.values.amax(1, keepdim=True)
    is_best = world.values.gather(1, values.argmax(1, keepdim=True)) >= best - 1e-6
    return 100 * float(is_best.float().mean()), float((values - world.values).abs().mean())

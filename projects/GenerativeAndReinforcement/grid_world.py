"""A grid with walls, an agent and a goal, whose optimal values are known: a toy environment, several copies at a time.

Shape letters: N copies or states, S side of the grid, K pairs of agent and goal.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NUM_ACTIONS", "GridWorld"]

NUM_ACTIONS = 4
_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
_WALLS = ((2, 1), (2, 2), (2, 3), (3, 3), (5, 4), (5, 5), (5, 6), (4, 6))
_SIDE = 8


class GridWorld:
    """An agent that walks to a goal. A step onto it gives 1 and ends the episode; a step into a wall leads nowhere.

    Args:
        discount: of a step.

    Attributes:
        pairs: [K, 2], all states: cell of the agent and cell of the goal, which is another one.
        distance: [K], steps to the goal on the shortest way.
        values: [K, actions], discounted sum of rewards of each action when all that follow are the best.
    """

    def __init__(self, discount: float = 0.9) -> None:
        self.discount = discount
        self._free = [cell for cell in range(_SIDE**2) if divmod(cell, _SIDE) not in _WALLS]
        self.next_cell = torch.tensor([[_move(cell, move) for move in _MOVES] for cell in range(_SIDE**2)])

        every = [(agent, goal) for goal in self._free for agent in self._free if agent != goal]
        self.pairs = torch.tensor(every)
        steps = torch.stack([self._count_steps(goal) for goal in range(_SIDE**2)])  # [goal, agent]
        agents, goals = self.pairs.unbind(1)
        self.distance = steps[goals, agents]
        self.values = discount ** steps[goals[:, None], self.next_cell[agents]]

    def _count_steps(self, goal: int) -> Tensor:
        """Steps from every cell to the goal; infinite from a wall."""
        steps = torch.full((_SIDE**2,), torch.inf)
        steps[goal] = 0
        for _ in range(_SIDE**2):
            steps = torch.minimum(steps, steps[self.next_cell].amin(1) + 1)
        return steps

    def draw_pairs(self, number: int, generator: torch.Generator) -> Tensor:
        """States [N, 2] at random."""
        return self.pairs[torch.randint(len(self.pairs), (number,), generator=generator)]

    def step(self, pairs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The states [N, 2] after actions [N], and whether the goal is reached [N], which gives the reward 1."""
        agents = self.next_cell[pairs[:, 0], actions]
        return torch.stack([agents, pairs[:, 1]], 1), agents == pairs[:, 1]

    def show(self, pairs: Tensor) -> Tensor:
        """Planes [N, 2, S, S] of states: the agent, the goal."""
        planes = torch.zeros(len(pairs), 2, _SIDE**2)
        planes.scatter_(2, pairs[:, :, None], 1)
        return planes.view(-1, 2, _SIDE, _SIDE)


def _move(cell: int, move: tuple[int, int]) -> int:
    row, column = cell // _SIDE + move[0], cell % _SIDE + move[1]
    is_blocked = not (0 <= row < _SIDE and 0 <= column < _SIDE) or (row, column) in _WALLS
    return cell if is_blocked else row * _SIDE + column

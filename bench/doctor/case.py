"""A model with a planted fault, or a healthy one, and everything that a tool may look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["PATIENTS", "Case", "Patient", "draw_images", "patient", "train"]


@dataclasses.dataclass
class Case:
    """A model as its user has it.

    Args:
        model: in the mode in which it is trained.
        data: batches as the model takes them.
        labels: of each batch, whole numbers; (): it is no classifier.
        optimizer: that trains it; None: not at hand.
        options: further ones of `bnext.diagnose`: averaged, before, domains ...
        config: (file, pairs) of a detector, whose model this is.
        diagnose: in place of `bnext.diagnose`, for what a training knows; called without arguments.
    """

    model: Any  # nn.Module, whose parts are read by name
    data: Sequence[Any] = ()
    labels: Sequence[Tensor] = ()
    optimizer: Optimizer | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: tuple[str, tuple[str, ...]] | None = None
    diagnose: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Patient:
    """A case by the function that makes it.

    Args:
        name: in the table.
        code: of the fault that is planted; "": none.
        library: whose architecture it is.
        make: makes it; called with torch's generator at a fixed seed.
    """

    name: str
    code: str
    library: str
    make: Callable[[], Case]


PATIENTS: list[Patient] = []


def patient(code: str, library: str, name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Put a function into `PATIENTS`."""

    def take(make: Callable[[], Case]) -> Callable[[], Case]:
        PATIENTS.append(Patient(name, code, library, make))
        return make

    return take


# ---- images, and a training on them


def draw_images(size: int = 32, num_images: int = 16, num_batches: int = 4, num_classes: int = 4, seed: int = 0) -> Any:
    """Batches of images whose brightness pattern tells their class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    batches, labels = [], []
    for _ in range(num_batches):
        label = torch.arange(num_images) % num_classes
        images = torch.randn(num_images, 3, size, size, generator=generator)
        images[:, :, : size // 2] += (label / num_classes - 0.5)[:, None, None, None]
        batches.append(images)
        labels.append(label)
    return batches, labels


def train(case: Case, num_steps: int = 30, lr: float = 0.02) -> Case:
    """A few steps on the case's own batches, with its optimizer."""
    if case.optimizer is None:
        case.optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=lr, momentum=0.9)

    case.model.train()
    for step in range(num_steps):
        number = step % len(case.data)
        case.optimizer.zero_grad()
        nn.functional.cross_entropy(case.model(case.data[number]), case.labels[number]).backward()
        case.optimizer.step()
    return case

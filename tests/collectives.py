"""What a worker sends, as torch's dispatcher sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NotedCollectives"]


class NotedCollectives(TorchDispatchMode):
    """In this scope the collectives of this worker are noted, also those of a backward pass.

    Attributes:
        names: of the collectives, such as "allgather_", in their order.
        num_bytes: of the tensors that this worker gave.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.names.append(function._opname)
            given = next(value for value in args[::-1] if _are_tensors(value))  # behind what is received
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in given)
        return function(*args, **(kwargs or {}))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, torch.Tensor) for element in value)

"""What a worker sends, as torch's dispatcher sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
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
            name = function._opname
            is_received_first = name.startswith(("allgather", "alltoall"))
            given = args[1 if is_received_first else 0]
            self.names.append(name)
            self.num_bytes += sum(tensor.nbytes for tensor in ([given] if isinstance(given, Tensor) else given))
        return function(*args, **(kwargs or {}))

"""Groups of workers that share something. Alone, every answer is the identity."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError

__all__ = ["count_cores", "get_rank", "get_world_size", "is_running", "resolve_group", "unwrap_model"]


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_running() -> bool:
    """Whether this process is one of a `torch.distributed` world."""
    return dist.is_available() and dist.is_initialized()


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Workers in `group` (default: all); 1 when no world is running."""
    return dist.get_world_size(group) if is_running() else 1


def get_rank(group: dist.ProcessGroup | None) -> int:
    """This worker's place among the workers of a group; 0 without one."""
    return dist.get_rank(group) if group is not None else 0


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel, by whose paths layers are named; any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class _Groups:
    """The process groups of one world. Making one is a collective and costs; each is made once."""

    world: dist.ProcessGroup | None = None
    made: dict[str | int, dist.ProcessGroup | None] = {}


def resolve_group(workers: str | int) -> dist.ProcessGroup | None:
    """The process group over which a norm shares its mini-batch, or None where it has no partner.

    Args:
        workers: "one" (this worker), "node" (those of this machine, by host name), `k` consecutive
            workers, or "all" (every worker).

    Raises:
        ConfigError: `k` does not divide the number of workers.

    Note:
        A collective over all workers, the first time that "node" or a number is asked for in a world.
    """
    if workers in ("one", 1) or get_world_size() == 1:
        return None
    if workers == "all":
        return dist.group.WORLD

    if _Groups.world is not dist.group.WORLD:
        _Groups.world, _Groups.made = dist.group.WORLD, {}
    if workers not in _Groups.made:
        _Groups.made[workers] = _make_group(workers)
    return _Groups.made[workers]


def _make_group(workers: str | int) -> dist.ProcessGroup | None:
    members = _list_node_members() if workers == "node" else _list_consecutive_members(int(workers))
    mine: Any = None

    for ranks in members:  # every worker makes every group: torch demands it
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks and len(ranks) > 1:
            mine = group
    return mine


def _list_consecutive_members(size: int) -> list[list[int]]:
    world_size = get_world_size()
    if world_size % size:
        divisors = ", ".join(str(k) for k in range(1, world_size + 1) if world_size % k == 0)
        rule = f"divide the number of all workers, {world_size}"
        raise ConfigError.of("workers", rule, got=size, where="NormSpec", remedy=f"Use one of {divisors}.")
    return [list(range(start, start + size)) for start in range(0, world_size, size)]


def _list_node_members() -> list[list[int]]:
    names: list[str] = [""] * get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return [[rank for rank, name in enumerate(names) if name == node] for node in dict.fromkeys(names)]

"""Which workers share something. Alone, every answer is the identity."""

from __future__ import annotations

import os

import torch.distributed as dist

__all__ = ["count_cores", "get_world_size", "is_running", "resolve_group"]


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_running() -> bool:
    """Whether this process is one of a `torch.distributed` world."""
    return dist.is_available() and dist.is_initialized()


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Workers in `group` (default: all); 1 when no world is running."""
    return dist.get_world_size(group) if is_running() else 1


def resolve_group(workers: str) -> dist.ProcessGroup | None:
    """The process group over which a norm shares its mini-batch, or None where it has no partner.

    Args:
        workers: "one" (this worker) or "all" (every worker).
    """
    if workers == "one" or get_world_size() == 1:
        return None
    return dist.group.WORLD

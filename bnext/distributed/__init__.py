"""The only place of bnext that calls `torch.distributed`."""

from bnext.distributed.collectives import all_gather_numbers, all_gather_stacked, all_reduce_sum, all_to_all_rows
from bnext.distributed.groups import get_rank, get_world_size, resolve_group, unwrap_model
from bnext.distributed.lock_step import LockStep, count_images
from bnext.distributed.moments import merge_moments_over_workers

__all__ = [
    "LockStep",
    "all_gather_numbers",
    "all_gather_stacked",
    "all_reduce_sum",
    "all_to_all_rows",
    "count_images",
    "get_rank",
    "get_world_size",
    "merge_moments_over_workers",
    "resolve_group",
    "unwrap_model",
]

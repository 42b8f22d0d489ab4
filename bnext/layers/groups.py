"""Samples that are normalized together, made known to the norms of a module: groups of a deal, the RoIs of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnext.errors import Refusal, StatisticsError
from bnext.functional import Groups
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.walk import find_bnext_norms
from bnext.scope.record import Scope

__all__ = ["find_grouping_norms", "use_groups"]

NO_GROUPING_NORM = Refusal(
    StatisticsError,
    "module",
    "have batch norms of bnext, each of a single feature map",
    "Convert its norms with convert_norm, or choose another module.",
)
NO_NUMBER_OF_GROUPS = Refusal(
    StatisticsError, "num_groups", "be 1 or more", "Say how many groups there are, on all workers together."
)
NO_GROUP_NUMBERS = Refusal(
    StatisticsError,
    "groups",
    "be one whole number per sample, 0 to {num_groups}",
    "Number the groups from 0 and say how many there are.",
)


def use_groups(module: nn.Module, groups: Tensor | Sequence[int], num_groups: int) -> Scope:
    """Let the samples of each group be a mini-batch of their own in the norms of a module, in this scope.

        y_i = weight * (x_i - mean_g) / sqrt(var_g + eps) + bias,  g = groups[i]

    Only norms of bnext that are normalized by mini-batches heed it; a norm over several workers joins the samples
    of a group of all workers. Every sample must reach the norms as a sample, in the same order.

    Args:
        module: with norms of bnext.
        groups: [N], for each sample of the batch its group, 0 to `num_groups` - 1.
        num_groups: how many there are, the same on all workers; some may be empty.

    Raises:
        StatisticsError: the module has no norm of bnext that can heed it, or the groups are out of range.

    Note:
        A deal (`deal_statistics`), or the RoI heads of bnext's architectures in evaluation mode, give their own groups
        in every call, which hold. Activation checkpointing computes activations again with the groups of their forward.
        Running statistics take in all groups of a call as one mini-batch.

    Example:
        >>> norm = BatchNorm2d(3)
        >>> rois = torch.randn(5, 3, 7, 7)
        >>> with use_groups(norm, [0, 0, 0, 1, 1], 2):
        ...     output = norm(rois)
        >>> bool(output[:3].mean().abs() < 1e-6)
        True
    """
    norms = find_grouping_norms(module)
    numbers = _check_groups(groups, num_groups).to(_find_device(norms), non_blocking=True)
    return Scope(groups=dict.fromkeys(norms, Groups(numbers, num_groups)))


def find_grouping_norms(module: nn.Module) -> list[BatchNorm2d]:
    """The norms of a module to which samples can come in groups.

    Raises:
        StatisticsError: there is none, or one sees several levels.
    """
    norms = list(find_bnext_norms(module).values())
    levels = [norm for norm in norms if isinstance(norm, LevelBatchNorm2d)]
    if levels or not norms:
        raise NO_GROUPING_NORM.of(
            f"one over the levels {levels[0].levels} ({levels[0].where})" if levels else "none", type(module).__name__
        )
    return norms


def _check_groups(groups: Tensor | Sequence[int], num_groups: int) -> Tensor:
    """The numbers as a tensor [N]."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
        raise NO_NUMBER_OF_GROUPS.of(repr(num_groups), "use_groups")

    try:
        numbers = torch.as_tensor(groups if isinstance(groups, Tensor) or len(groups) else torch.empty(0).long())
    except (TypeError, ValueError, RuntimeError):  # of words, or of lists of different lengths
        numbers = torch.empty(0)

    wrong = repr(groups)
    if not numbers.is_floating_point() and not numbers.is_complex() and numbers.dtype != torch.bool:
        outside = numbers[(numbers < 0) | (numbers >= num_groups)]
        if numbers.dim() == 1 and not len(outside):
            return numbers.long()
        wrong = str(int(outside[0])) if len(outside) else f"the shape {list(numbers.shape)}"

    raise NO_GROUP_NUMBERS.of(wrong, "use_groups", num_groups=num_groups - 1)


def _find_device(norms: Sequence[BatchNorm2d]) -> torch.device | None:
    tensors = [tensor for norm in norms for tensor in (*norm.parameters(), *norm.buffers())]
    return tensors[0].device if tensors else None

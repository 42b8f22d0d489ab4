"""A norm of one feature map that a head applies to one level after the other: found in the first steps, and told.

Each call then has mini-batch statistics of its own while all share running statistics: row 3 of the paper's Table 5,
which nobody asked for. A call alone cannot know; that the parameters have not moved since the last one, which had
features of another size, says that both belong to one step.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext.notices import tell_once

__all__ = ["NO_CALL", "Call", "watch_call"]

log = logging.getLogger(__name__)

REPEATED = (
    "%s was called again in one step, with features of another size: every call has mini-batch statistics of its own, "
    "but all share running statistics (row 3 of Table 5), so inference normalizes otherwise than training. In a head "
    "over several levels use bnext.heads.RetinaNetHead, FCOSHead or RPNHead (in a YAML config MODEL.META_ARCHITECTURE "
    "BNextRetinaNet or BNextFCOS), elsewhere LevelBatchNorm2d or CycleBatchNormList; a trained model is mended by "
    "bnext.repair(model, data)."
)
_STEPS = 3  # that are watched


class Call(NamedTuple):
    """The last call of a norm, as far as it is remembered.

    Args:
        state: of its weight and gradient, by versions; it changes with every backward pass and optimizer's step.
        size: of its feature, [N, H, W].
        number: of steps that were seen.
    """

    state: tuple[int, ...]
    size: tuple[int, ...]
    number: int


NO_CALL = Call((), (), 0)


def watch_call(norm: Any, feature: Tensor, last: Call) -> Call | None:
    """The call in training, to be remembered; None: there is nothing more to watch.

    Args:
        norm: a batch norm of one feature map.
        feature: [N, C, H, W].
        last: what was remembered of the call before.
    """
    weight, spec = norm.weight, norm.spec
    is_concerned = norm.uses_mini_batch and spec.population == "shared" and norm.sources == ("",)
    if not is_concerned or weight is None:
        return None
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return last

    gradient = weight.grad
    state = (weight._version,) if gradient is None else (weight._version, id(gradient), gradient._version)
    size = (feature.shape[0], *feature.shape[2:])
    if state != last.state:
        return Call(state, size, last.number + 1) if last.number < _STEPS else None
    if size[0] == last.size[0] and size[1:] != last.size[1:]:
        tell_once(log, "calls", REPEATED, norm.where)
        return None
    return Call(state, size, last.number)

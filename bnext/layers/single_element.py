"""A mini-batch of a single element per channel has no variance: an error, or the population's statistics."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnext.errors import Refusal, StatisticsError
from bnext.functional import Grouping, Moments, count_elements, make_index, sum_groups
from bnext.notices import tell_once
from bnext.scope.call import NormCall

if TYPE_CHECKING:
    from bnext.layers.batch_norm import BatchNorm2d

__all__ = ["explaining_single_values", "may_have_single_elements", "replace_single_elements", "select_single_elements"]

log = logging.getLogger(__name__)

ALONE = "A mini-batch of a single element per channel was normalized by the population statistics (%s)."
SINGLE_ELEMENT = Refusal(
    StatisticsError,
    "a mini-batch",
    "hold more than 1 element per channel in {evaluation}",
    "Use {fewer}larger images, more samples, statistics shared over levels, domains or workers, or {answer} (in a "
    "config {key} of the norm's node of MODEL.BNEXT).",
)

SINGLE_VALUE = Refusal(
    StatisticsError,
    "every group that a norm of torch normalizes",
    "have more than one value",
    "Use larger images (INPUT.MIN_SIZE_TRAIN and MIN_SIZE_TEST), more images of a worker, more channels for GN's 32 "
    "groups, or another NORM for the place.",
)


@contextlib.contextmanager
def explaining_single_values(where: str) -> Iterator[None]:
    """Within the block torch's complaint about a group norm or batch norm with a single value is one of the config.

    Raises:
        StatisticsError: instead of torch's ValueError.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SINGLE_VALUE.of(str(error), where) from error


def may_have_single_elements(features: Sequence[Tensor], grouping: Grouping, is_shared: bool) -> bool:
    """Whether some mini-batch may have one element per channel; else the device need not be asked.

    Args:
        features: [N_l, C, H_l, W_l].
        grouping: of their samples.
        is_shared: whether other workers share the mini-batches: one that has no element here may have one in all, and
            all workers must see it.
    """
    num_positions = [x.shape[2] * x.shape[3] for x in features]
    if any(isinstance(part, Tensor) for part in grouping.parts):  # groups whose sizes only the device knows
        return 1 in num_positions

    local = count_elements([len(x) for x in features], num_positions, grouping)
    return any(number == 1 or (number == 0 and is_shared) for number in local)


def replace_single_elements(
    norm: BatchNorm2d,
    statistics: Moments,
    moments: Moments,
    grouping: Grouping,
    part_names: Sequence[str],
    call: NormCall,
) -> Moments:
    """Statistics [B] with those of the population where a mini-batch has one element. It waits for the device.

    Args:
        norm: whose populations are taken.
        statistics: of the mini-batches.
        moments: of the parts, [P].
        grouping: of the samples.
        part_names: the level or domain of each part.
        call: what the call of the norm knows.

    Raises:
        StatisticsError: the norm keeps no population, or its spec says that this is an error.
    """
    alone = (statistics.count == 1).nonzero().flatten().tolist()
    if not alone:
        return statistics

    mini_batches = [list(field.unbind()) for field in statistics]
    for batch in alone:
        parts = [part for part, owner in enumerate(grouping.mini_batches) if owner == batch]
        part = next(part for part in parts if moments.count[part] == 1)
        name = part_names[part]

        _check_is_allowed(norm, name, call)
        tell_once(log, norm, ALONE, norm.name_place(name))
        norm.check_populations([name])
        population = norm.stack_populations([name])
        for values, field in zip(mini_batches, population, strict=True):
            values[batch] = field[0]
    return Moments(*map(torch.stack, mini_batches))


def select_single_elements(
    norm: BatchNorm2d,
    statistics: Moments,
    moments: Moments,
    grouping: Grouping,
    part_names: Sequence[str],
    call: NormCall,
) -> Moments:
    """`replace_single_elements` as operators that choose when they run: an export does not know the sizes.

    Nothing is refused: a mini-batch of one element without a population comes out as the bias.
    """
    if call.spec.population == "none":
        return statistics

    _, mean, var = norm.stack_populations(part_names)
    num_batches = max(grouping.mini_batches) + 1
    if num_batches < len(part_names):  # the part that has the element is taken
        has_one = (moments.count == 1).to(mean.dtype).unsqueeze(1)
        owners = make_index(grouping.mini_batches, mean.device)
        mean, var = (sum_groups(has_one * field, owners, num_batches) for field in (mean, var))

    is_alone = (statistics.count == 1).unsqueeze(1)
    mean, var = torch.where(is_alone, mean, statistics.mean), torch.where(is_alone, var, statistics.var)
    return Moments(statistics.count, mean, var)


def _check_is_allowed(norm: BatchNorm2d, name: str, call: NormCall) -> None:
    has_population = norm.has_population
    if has_population and not (norm.training and call.spec.single_element == "error"):
        return

    fewer = "" if call.groups is None else f"fewer groups than {call.groups.num_groups}, "
    answer = "single_element='population'" if has_population else "population='shared'"
    key = answer.partition("=")[0].upper()
    evaluation = "training" if norm.training else "evaluation"
    raise SINGLE_ELEMENT.of(1, norm.name_place(name), evaluation=evaluation, fewer=fewer, answer=answer, key=key)

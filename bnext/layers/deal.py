"""Dealt statistics: shuffle BN without moving a sample.

The samples of all workers are dealt out at random to groups, so that no mini-batch is the RoIs of one image. A sample
stays where it is and gets the statistics of its group: 2C + 1 numbers per group and norm travel instead of features.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnext.distributed import all_gather_numbers, get_rank, get_world_size, resolve_group
from bnext.errors import ConfigError, Refusal, StatisticsError
from bnext.functional import Groups, deal_samples
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.groups import find_grouping_norms
from bnext.layers.spec import Workers
from bnext.layers.walk import find_bnext_norms, find_foreign_norms
from bnext.notices import tell_once
from bnext.scope.record import Scope, close_scopes

__all__ = ["Draw", "StatisticsDeal", "deal_statistics", "draw_seed", "join_gradients"]

log = logging.getLogger(__name__)

ONE_GROUP = "Statistics are not dealt (%s): there is one group, as one worker shares them (workers=%r). %s"
OTHER_FORMS = Refusal(
    ConfigError, "samples", "be dealt in the same form on all workers", "Build the model alike on every worker."
)
OTHER_NUMBERS_OF_GROUPS = Refusal(
    ConfigError, "num_groups", "be the same on all workers", "Build the model alike on every worker."
)
REENTRANT = Refusal(
    StatisticsError,
    "activation checkpointing of what workers share",
    "be without reentrance where the features of a worker need no gradient, as those of no RoI",
    "Set use_reentrant=False.",
)
FOREIGN_NORM = Refusal(
    StatisticsError,
    "all batch norms of a module whose samples are dealt",
    "be of bnext",
    "Convert a BatchNorm2d with convert_norm; with one of another kind move the features: "
    "Shuffled(module), in a config SHUFFLE: features.",
)
DEALT_ALREADY = Refusal(
    ConfigError, "a module", "be dealt to once", "Call its remove() first, in a config leave SHUFFLE at 'none'."
)
NO_NUMBER_OF_GROUPS = Refusal(
    ConfigError,
    "num_groups",
    "be 2 or more, or None for one per worker",
    "One group over all workers is a SyncBN: use workers='all' without a deal.",
)
SIZE_BESIDE_DEAL = Refusal(
    ConfigError,
    "normalization_batch_size",
    "be None where statistics are dealt",
    "The number of groups says how many samples are normalized together.",
)
NOBODY_TO_DEAL_TO = Refusal(
    ConfigError,
    "num_groups",
    "be given where each worker has its own mini-batches",
    "Give a number, or share over workers: convert_norm(module, {{'': NormSpec(workers='all')}}).",
)
NO_FEATURES_FIRST = Refusal(
    StatisticsError,
    "a module whose samples are dealt",
    "get their features [N, C, H, W] first",
    "Deal a part of it that does.",
)
OTHER_WORKERS = Refusal(
    ConfigError, "workers", "be the same for all norms that share a deal", "Convert them with one spec."
)

Form = Literal["statistics", "features"]


def draw_seed() -> int:
    """A seed from torch's generator, for what all workers of a step draw alike: one of them gives it to the others.

    It is reproducible, and comes again after a resume, as whatever else a step draws; activation checkpointing, which
    puts the generator back, draws the same.
    """
    return int(torch.randint(2**62, (), device="cpu"))


class Draw(NamedTuple):
    """The numbers that the workers of a deal have of one another.

    Args:
        num_samples: of each worker.
        seed: of the deal.
        needs_gradient: of each worker, whether its feature does.
        details: of each worker, a number that should be the same on all.
    """

    num_samples: list[int]
    seed: int
    needs_gradient: list[int]
    details: list[int]

    @classmethod
    def over_workers(
        cls, feature: Tensor, group: dist.ProcessGroup | None, form: Form, detail: int, where: str
    ) -> Draw:
        """A collective, whose answer is waited for.

        Raises:
            ConfigError: another worker deals in the other form.
        """
        forms = get_args(Form)
        message = [len(feature), draw_seed(), int(feature.requires_grad), detail, forms.index(form)]
        columns = zip(*all_gather_numbers(message, group, feature.device, where), strict=True)
        num_samples, seeds, needs_gradient, details, indices = (list(column) for column in columns)

        if len(set(indices)) > 1:
            raise OTHER_FORMS.of([forms[index] for index in indices], where)
        return cls(num_samples, seeds[0], needs_gradient, details)


class StatisticsDeal:
    """The deal that `deal_statistics` has attached to a module; `remove()` takes it away.

    Attributes:
        num_groups: as given.
        remedy: of a deal to a single group, for the warning.
    """

    remedy = "Set the number of groups for a shuffle within a worker."

    def __init__(self, module: nn.Module, num_groups: int | None) -> None:
        self.num_groups = num_groups
        self._handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the module as it was before."""
        for handle in self._handles:
            handle.remove()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        close_scopes(self)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if "_handles" not in vars(self):  # from a file of 0.1, where the groups of a call stayed until the next one
            self._handles = [vars(self)["_handle"], module.register_forward_hook(self._after, always_call=True)]

        norms = find_bnext_norms(module).values()
        dealing = [norm for norm in norms if norm.training and norm.uses_mini_batch]
        if not dealing:
            return None

        where = dealing[0].where
        feature = _find_feature(args, where)
        workers = _find_workers(dealing)
        group = resolve_group(workers)
        num_groups = self.num_groups or get_world_size(group) if group is not None else self.num_groups or 1
        if num_groups == 1:
            self._tell_one_group(dealing[0], workers)
            return None

        draw = Draw.over_workers(feature, group, "statistics", num_groups, where)
        if len(set(draw.details)) > 1:
            raise OTHER_NUMBERS_OF_GROUPS.of(draw.details, where)

        num_groups = min(num_groups, max(sum(draw.num_samples), 1))  # the others would be empty, and cost memory
        numbers = deal_samples(draw.num_samples, num_groups, draw.seed)[get_rank(group)]
        groups = Groups(numbers.to(feature.device, non_blocking=True), num_groups)
        Scope(self, groups=dict.fromkeys(dealing, groups)).__enter__()
        return (join_gradients(feature, draw.needs_gradient, where), *args[1:])

    def _tell_one_group(self, norm: BatchNorm2d, workers: Workers) -> None:
        tell_once(log, self, ONE_GROUP, norm.where, workers, self.remedy)


def join_gradients(feature: Tensor, needs_gradient: list[int], where: str) -> Tensor:
    """A feature that needs a gradient where that of another worker does, who waits for this one in the backward pass.

    Args:
        needs_gradient: of each worker, whether its feature does.
        where: the layer, for the error.

    Raises:
        StatisticsError: activations are to be computed again by a backward pass that this worker would not have.
    """
    if not any(needs_gradient) or all(needs_gradient):
        return feature

    if not torch.is_grad_enabled():
        raise REENTRANT.of("use_reentrant=True", where)
    return feature if feature.requires_grad else feature.detach().requires_grad_().clone()  # a leaf forbids in-place


def deal_statistics(module: nn.Module, num_groups: int | None = None) -> StatisticsDeal:
    """Deal the samples of every training batch of a module out at random to groups; each is a mini-batch of its norms.

    The samples stay where they are: only the moments of the groups travel between the workers that the norms' specs
    name. The result is that of `Shuffled` wherever the module treats samples alone but for its norms.

    Args:
        module: its first argument is the feature [N, C, H, W] of its samples, such as RoIs; the norms are bnext's.
        num_groups: over all workers that share statistics, 2 or more ("virtual workers"); None: one for each of them.

    Returns:
        The deal, attached to the module by a hook; its `remove()` ends it.

    Raises:
        ConfigError: `num_groups` is below 2, the norms name different workers, have a normalization batch size, or are
            of one worker without a number of groups; the module, or a part of it, is dealt to already.
        StatisticsError: the module has no norm of bnext, or a batch norm of somebody else.

    Note:
        One more collective for each call in training, of five numbers per worker, for which it waits. The sizes of
        the groups differ by at most one; with fewer samples than groups some are empty. All norms of a module have the
        same deal. In evaluation mode nothing is dealt. Samples that are all of one image stay so in any deal.
        Activation checkpointing of the module must keep torch's generator, as it does by default, and be without
        reentrance where a worker may have no sample. A part of it is computed again with the deal of its forward.

    Example:
        >>> head = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), BatchNorm2d(8), nn.ReLU())
        >>> deal = deal_statistics(head, num_groups=4)
        >>> output = head(torch.randn(32, 4, 7, 7))
        >>> deal.remove()

    Source:
        He et al., *Momentum Contrast*, 2020 (shuffle BN); Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021,
        section 6; that the features need not move follows from the formula of batch normalization.
    """
    _check_deal(module, num_groups)
    return StatisticsDeal(module, num_groups)


def _check_deal(module: nn.Module, num_groups: int | None) -> None:
    norms = find_grouping_norms(module)
    where = norms[0].where

    for name, norm in find_foreign_norms(module).items():
        # It would normalize the groups of a deal together, RoIs of one image and all.
        raise FOREIGN_NORM.of(type(norm).__name__, name)
    for name, part in module.named_modules():
        owners = [getattr(hook, "__self__", None) for hook in part._forward_pre_hooks.values()]
        if any(isinstance(owner, StatisticsDeal) for owner in owners):
            raise DEALT_ALREADY.of(f"a deal on {name or 'the module'}", where)

    is_count = isinstance(num_groups, int) and not isinstance(num_groups, bool)
    if num_groups is not None and (not is_count or num_groups < 2):
        raise NO_NUMBER_OF_GROUPS.of(repr(num_groups), "deal_statistics")
    for norm in norms:
        if norm.spec.normalization_batch_size is not None:
            raise SIZE_BESIDE_DEAL.of(norm.spec.normalization_batch_size, norm.where)

    workers = _find_workers([norm for norm in norms if not norm.spec.has_frozen_statistics] or norms)
    if num_groups is None and workers in ("one", 1):
        raise NOBODY_TO_DEAL_TO.of("None with workers='one'", where)


def _find_feature(args: tuple[Any, ...], where: str) -> Tensor:
    if args and isinstance(args[0], Tensor) and args[0].dim():
        return args[0]

    raise NO_FEATURES_FIRST.of(type(args[0]).__name__ if args else "no argument", where)


def _find_workers(norms: list[BatchNorm2d]) -> Workers:
    first = norms[0]
    for norm in norms:
        if norm.spec.workers != first.spec.workers:
            raise OTHER_WORKERS.of(f"{first.spec.workers!r} ({first.where}) and {norm.spec.workers!r}", norm.where)
    return first.spec.workers

"""Shuffle BN by moving features: random samples of all workers go through a module, and their outputs come back.

For modules that couple samples otherwise than by norms of bnext; for those `bnext.layers.deal` does the same without
moving a feature.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnext.distributed import all_to_all_rows, get_rank, resolve_group
from bnext.errors import Refusal, StatisticsError
from bnext.functional import deal_samples
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.deal import Draw, join_gradients
from bnext.layers.spec import NormSpec, Workers
from bnext.layers.walk import find_norms

__all__ = ["Shuffled", "shares_work", "shuffle_features"]

NOT_A_ROW_PER_SAMPLE = Refusal(
    StatisticsError,
    "a shuffled module",
    "return a tensor with one row per sample",
    "Shuffle the part of it that does, or deal statistics.",
)
OTHER_SHAPES = Refusal(
    StatisticsError,
    "features",
    "have samples of the same shape on all workers",
    "Look for the worker that pools or crops otherwise; one without samples gives [0, ...] with the "
    "shape of the others.",
)


class _Route(NamedTuple):
    """The way of samples to the workers that they were dealt to.

    Args:
        order: [N], own samples sorted by destination.
        inverse: the permutation that undoes it.
        send, receive: numbers of samples to and from each worker.
    """

    order: Tensor
    inverse: Tensor
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup
    where: str

    def go(self, rows: Tensor) -> Tensor:
        return all_to_all_rows(rows.index_select(0, self.order), self.send, self.receive, self.group, self.where)

    def come_back(self, rows: Tensor) -> Tensor:
        back = all_to_all_rows(rows, self.receive, self.send, self.group, self.where)
        return back.index_select(0, self.inverse)


class _Go(torch.autograd.Function):
    """Own samples [N, ...] to the samples that were dealt to this worker; gradients come back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return route.go(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ComeBack.apply(grad, ctx.route), None  # the adjoint, itself differentiable


class _ComeBack(torch.autograd.Function):
    """The way back of `_Go`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return route.come_back(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Go.apply(grad, ctx.route), None


class Shuffled(nn.Module):
    """A module that gets, in training, random samples of all workers, and whose outputs come back.

    Samples are dealt evenly (numbers differ by at most one) and move by one uneven all-to-all there and one back. For
    modules that couple samples otherwise than by norms of bnext; where those are all, `deal_statistics` gives the
    same result and moves some thousandth of it.

    Args:
        module: tensor [N, ...] -> tensor [N, ...]; its state-dict keys get the prefix "module.".
        workers: that exchange samples: "all", "node", or `k` consecutive workers.
        where: its name in messages.

    Note:
        In evaluation mode, and alone (which is logged once), the module is called as it is. Batch norms in it should
        be of one worker; each worker's running statistics follow its share of the samples. The module must cope with
        no sample at all, where there are fewer than workers. Three collectives forward and two backward, on every
        worker; the first, of five numbers per worker, is waited for.

    Example:
        >>> head = Shuffled(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
        >>> head(torch.randn(32, 4, 7, 7)).shape
        torch.Size([32, 8, 5, 5])

    Source:
        See `deal_statistics`.
    """

    shares_samples = True  # see `shares_work`

    def __init__(self, module: nn.Module, workers: Workers = "all", where: str = "") -> None:
        super().__init__()
        self.module = module
        self.workers = NormSpec(workers=workers).workers  # which refuses what names no workers
        self.where = where or type(module).__name__
        if resolve_group(workers) is None:
            logging.getLogger(__name__).warning(
                "Samples are not shuffled (%s): one worker has nobody to exchange them with (workers=%r).",
                self.where,
                workers,
            )

    def forward(self, input: Tensor) -> Tensor:
        """Tensor of the samples of this worker -> their outputs, in their order."""
        return shuffle_features(self.module, self.module, input, self.workers, self.where)


def shuffle_features(
    module: nn.Module, function: Callable[[Tensor], Tensor], features: Tensor, workers: Workers = "all", where: str = ""
) -> Tensor:
    """Call a function of samples on random samples of all workers; see `Shuffled`.

    Args:
        module: that `function` belongs to: samples move while it, or a batch norm in it, is in training mode.
        function: tensor [N, ...] -> tensor [N, ...].
        features: [N, ...], of this worker.
        workers, where: see `Shuffled`.

    Raises:
        StatisticsError: what `function` returns is no tensor with one row per sample, or the shapes of samples differ
            between workers.
    """
    group = resolve_group(workers)
    if group is None or not _is_in_training(module):
        return function(features)

    features, route = _draw_route(features, group, where)
    moved = _Go.apply(features, route)
    output = function(moved)

    if not isinstance(output, Tensor) or output.shape[:1] != moved.shape[:1]:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NOT_A_ROW_PER_SAMPLE.of(f"{shape} for {len(moved)} samples", where)
    return _ComeBack.apply(output, route)


def _draw_route(features: Tensor, group: dist.ProcessGroup, where: str) -> tuple[Tensor, _Route]:
    """Where the samples go; and the features, with a gradient on every worker if some worker needs one."""
    draw = Draw.over_workers(features, group, "features", math.prod(features.shape[1:]), where)
    rank, device = get_rank(group), features.device
    if len(set(draw.details)) > 1:
        raise OTHER_SHAPES.of(
            f"{list(features.shape[1:])} on worker {rank}, and {draw.details} numbers per sample on all", where
        )

    destinations = deal_samples(draw.num_samples, group.size(), draw.seed)
    order = destinations[rank].argsort(stable=True)
    send = destinations[rank].bincount(minlength=group.size()).tolist()
    receive = [int((numbers == rank).sum()) for numbers in destinations]

    features = join_gradients(features, draw.needs_gradient, where)
    return features, _Route(order.to(device), order.argsort().to(device), send, receive, group, where)


def _is_in_training(module: nn.Module) -> bool:
    """A re-estimation of statistics has the norms alone in training mode."""
    return module.training or any(norm.training for norm in find_norms(module).values())


def shares_work(model: nn.Module) -> bool:
    """Whether a forward of the model, as its modes are, needs the other workers: for statistics or for samples.

    Of batch norms of somebody else it is not known: those that are not torch's plain ones count as sharing.
    """
    if resolve_group("all") is None:
        return False

    norms = find_norms(model).values()
    shares_statistics = any(norm.training and _may_share(norm) for norm in norms)
    return shares_statistics or any(getattr(module, "shares_samples", False) for module in model.modules())


def _may_share(norm: nn.Module) -> bool:
    if isinstance(norm, BatchNorm2d):
        return norm.uses_mini_batch and resolve_group(norm.spec.workers) is not None
    return type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

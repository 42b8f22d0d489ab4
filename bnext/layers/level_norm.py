"""One batch norm over the features of several levels (of an FPN, say), each level named.

A convolution that is applied to every level of a pyramid sees several domains. `LevelBatchNorm2d`
receives all of them in one call, so that it can treat them as one mini-batch or as several, and
knows each by its name: no call is counted, and a level that is left out shifts no other.

What is not here: a norm of a single feature map, which torch's BatchNorm2d already is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnext.distributed import all_gather_stacked, all_reduce_sum, resolve_group
from bnext.errors import ConfigError, StatisticsError
from bnext.functional import Moments, normalize_levels, update_running_statistics
from bnext.layers.spec import NormSpec

__all__ = ["LevelBatchNorm2d"]


class LevelState(nn.BatchNorm2d):
    """What one level owns of a norm: its affine, its running statistics, or both. It is never called.

    A BatchNorm2d by type, so that optimizers exempt its affine from weight decay as every norm's.
    """

    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("LevelState must not be called; it holds one level's part of a LevelBatchNorm2d.")


class LevelBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization of several named levels in one call; all six rows of the paper's Table 5.

        y_l = weight_l * ((x_l - mean_b) / sqrt(var_b + eps)) + bias_l

    b is the mini-batch of level l in training, its population statistics otherwise. What the levels
    share lies on the layer under torch's names (`weight`, `running_mean`, ...), what each owns under
    its name (`p3.weight`, `p3.running_mean`, ...).

    Args:
        num_features: channels C.
        levels: names of the levels, for example ("p3", "p4", "p5", "p6", "p7"); in this order a
            running average that all levels share takes in their moments.
        spec: which statistics, whose population, whose affine, over which workers.

    Raises:
        ConfigError: no levels, a name twice, or a name that is an attribute of the layer.

    Note:
        With workers="all" every worker calls one collective forward and one backward; a worker
        without samples takes part with empty features.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 5.3 and Table 5.
    """

    def __init__(self, num_features: int, levels: Sequence[str], spec: NormSpec | None = None) -> None:
        spec = spec or NormSpec()
        super().__init__(
            num_features,
            eps=spec.eps,
            momentum=spec.momentum,
            affine=spec.affine == "shared",
            track_running_stats=spec.population == "shared",
        )
        self.spec = spec
        self.levels = tuple(levels)
        self.path = ""  # where the layer is in its model, for messages; see name_norms
        self._check_levels()
        owns_affine, owns_population = spec.affine == "per_level", spec.population == "per_level"
        if owns_affine or owns_population:
            for level in self.levels:
                state = LevelState(num_features, spec.eps, spec.momentum, owns_affine, owns_population)
                self.add_module(level, state)

    def _check_levels(self) -> None:
        if not self.levels:
            raise ConfigError("levels must name at least one level; got none (LevelBatchNorm2d). Name the features.")
        for level in self.levels:
            if self.levels.count(level) > 1 or hasattr(self, level) or not level or "." in level:
                raise ConfigError(
                    f"levels must be distinct, without dots, and no attribute of the layer; got {self.levels!r} "
                    f"(LevelBatchNorm2d, {level!r}). Rename the feature."
                )

    def extra_repr(self) -> str:
        spec = self.spec
        answers = f"statistics={spec.statistics}, population={spec.population}, affine={spec.affine}"
        return f"{self.num_features}, levels={self.levels}, {answers}, workers={spec.workers}"

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Normalize the features of some or all levels.

        Args:
            features: level name -> [N, C, H, W]; samples and sizes may differ, a level may be empty
                or absent. Levels that are given share a mini-batch if the spec says so.

        Returns:
            level name -> tensor of the same shape and type, in the same order.

        Raises:
            StatisticsError: an unknown level, a tensor instead of named levels, a wrong number of
                channels, or a mini-batch of a single element per channel in training.

        Note:
            In training the running statistics move: one update per call where mini-batch statistics
            are shared; otherwise one per level, in the order of `levels`.
        """
        self._check_features(features)
        if not self.training:
            return {level: self._normalize_by_population(level, feature) for level, feature in features.items()}
        present = [level for level in self.levels if level in features]
        outputs = self._normalize_by_mini_batch(present, [features[level] for level in present])
        by_level = dict(zip(present, outputs, strict=True))
        return {level: by_level[level] for level in features}

    def population_state(self, level: str) -> nn.BatchNorm2d:
        """The module whose running statistics normalize this level: the layer, or the level's own."""
        return self if self.spec.population == "shared" else self.get_submodule(level)  # type: ignore[return-value]

    def affine_state(self, level: str) -> nn.BatchNorm2d:
        """The module whose weight and bias scale and shift this level."""
        return self if self.spec.affine == "shared" else self.get_submodule(level)  # type: ignore[return-value]

    def populations(self) -> Iterator[tuple[tuple[str, ...], nn.BatchNorm2d]]:
        """Each set of population statistics, with the levels that it normalizes."""
        if self.spec.population == "shared":
            yield self.levels, self
        else:
            for level in self.levels:
                yield (level,), self.population_state(level)

    def _normalize_by_population(self, level: str, feature: Tensor) -> Tensor:
        population, affine = self.population_state(level), self.affine_state(level)
        return F.batch_norm(
            feature, population.running_mean, population.running_var, affine.weight, affine.bias, False, 0.0, self.eps
        )

    def _normalize_by_mini_batch(self, levels: list[str], features: list[Tensor]) -> list[Tensor]:
        if not levels:
            return []
        shares_statistics = self.spec.statistics == "shared"
        mini_batches = [0] * len(levels) if shares_statistics else list(range(len(levels)))
        group = resolve_group(self.spec.workers)
        if group is None:
            self._check_more_than_one_element(levels, features, mini_batches)
        states = [self.affine_state(level) for level in levels]
        outputs, moments = normalize_levels(
            features,
            torch.stack([state.weight for state in states]),
            torch.stack([state.bias for state in states]),
            self.eps,
            mini_batches,
            gather=partial(all_gather_stacked, group=group) if group else None,
            reduce=partial(all_reduce_sum, group=group) if group else None,
        )
        if shares_statistics and self.spec.population == "shared":
            self._update_population(self, moments.mini_batches, 0)
        else:
            for index, level in enumerate(levels):
                self._update_population(self.population_state(level), moments.levels, index)
        return outputs

    @torch.no_grad()
    def _update_population(self, state: Any, moments: Moments, index: int) -> None:
        own = Moments(moments.count[index], moments.mean[index], moments.var[index])
        mean, var = update_running_statistics(state.running_mean, state.running_var, own, cast(float, self.momentum))
        state.running_mean.copy_(mean)
        state.running_var.copy_(var)
        state.num_batches_tracked.add_((own.count >= 2).to(state.num_batches_tracked.dtype))

    def _check_features(self, features: Mapping[str, Tensor]) -> None:
        where = self.path or type(self).__name__
        if not isinstance(features, Mapping):
            raise StatisticsError(
                f"features must be a mapping of level names to tensors; got {type(features).__name__} ({where}). "
                f"Call the norm once with all levels, not once per level."
            )
        for level, feature in features.items():
            if level not in self.levels:
                raise StatisticsError(
                    f"features must be of the levels {self.levels}; got {level!r} ({where}). "
                    f"Name the level when the norm is built."
                )
            if feature.dim() != 4 or feature.shape[1] != self.num_features:
                raise StatisticsError(
                    f"features must be [N, {self.num_features}, H, W]; got {list(feature.shape)} ({where}, {level}). "
                    f"Check the channels of the layer before it."
                )

    def _check_more_than_one_element(self, levels: list[str], features: list[Tensor], mini_batches: list[int]) -> None:
        """One element has no variance: refuse it as torch does, but by the names of layer and level."""
        for mini_batch in set(mini_batches):
            members = [i for i, owner in enumerate(mini_batches) if owner == mini_batch]
            if sum(features[i].numel() for i in members) == self.num_features:
                raise StatisticsError(
                    f"a mini-batch must hold more than 1 element per channel in training; got 1 "
                    f"({self.path or type(self).__name__}, {', '.join(levels[i] for i in members)}). "
                    f"Use larger images, more images per worker, or statistics shared over levels or workers."
                )

"""One batch norm over the features of several levels (of an FPN, say), each level named.

A convolution that is applied to every level of a pyramid sees several domains. `LevelBatchNorm2d`
receives all of them in one call, so that it can treat them as one mini-batch or as several, and
knows each by its name: no call is counted, and a level that is left out shifts no other.

What is not here: a norm of a single feature map, which torch's BatchNorm2d already is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnext.distributed import resolve_group
from bnext.errors import ConfigError, Refusal, StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.scope.call import NormCall, read_call

__all__ = ["LevelBatchNorm2d"]

NO_FEATURE = Refusal(
    StatisticsError,
    "features",
    "hold a level on every worker that shares mini-batches",
    "Pass features without samples, [0, {num_features}, H, W], and use outputs in the loss.",
)
NO_MAPPING = Refusal(
    StatisticsError,
    "features",
    "be a mapping of level names to tensors",
    "Call the norm once with all levels, not once per level.",
)
UNKNOWN_LEVEL = Refusal(
    StatisticsError, "features", "be of the levels {levels}", "Name the level when the norm is built."
)


class LevelBatchNorm2d(BatchNorm2d):
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
        device, dtype: of its state, as torch's.

    Raises:
        ConfigError: no levels, a name twice, or a name that is an attribute of the layer.

    Note:
        With workers="all" every worker calls one collective forward and one backward; a worker
        without samples takes part with empty features.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 5.3 and Table 5.
    """

    def __init__(
        self,
        num_features: int,
        levels: Sequence[str],
        spec: NormSpec | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = NormSpec() if spec is None else spec
        if not levels:
            rule, got, remedy = "name at least one level", "none", "Name the features."
            raise ConfigError.of("levels", rule, got=got, where="LevelBatchNorm2d", remedy=remedy)
        if isinstance(levels, str):
            rule, remedy = "be a sequence of names", f"Write ({levels!r},)."
            raise ConfigError.of("levels", rule, got=repr(levels), where="LevelBatchNorm2d", remedy=remedy)
        if isinstance(spec, NormSpec) and spec.owner == "per_domain":
            rule, remedy = "not be per_domain in a norm over levels", "Use per_level: its domains are the levels."
            raise ConfigError.of("spec", rule, got=spec, where="LevelBatchNorm2d", remedy=remedy)

        super().__init__(num_features, spec, levels=levels, device=device, dtype=dtype)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels."""
        return self.domains

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Normalize the features of some or all levels.

        Args:
            features: level name -> [N, C, H, W]; samples and sizes may differ, a level may be empty
                or absent. Levels that are given share a mini-batch if the spec says so.

        Returns:
            level name -> tensor of the same shape and type, in the same order.

        Raises:
            StatisticsError: an unknown level, a tensor instead of named levels, and what `BatchNorm2d` raises.

        Note:
            In training the running statistics move: one update per call where mini-batch statistics
            are shared; otherwise one per level, in the order of `levels`.
        """
        self._check_levels(features)
        present = {level: index for index, level in enumerate(self.levels) if level in features}
        call = read_call(self, self._spec, self.where)
        if not present:
            self._check_is_alone(call)
            return {}

        inputs = [features[level] for level in present]
        outputs = self.normalize_features(inputs, list(present.values()), self.levels, call)
        by_level = dict(zip(present, outputs, strict=True))
        return {level: by_level[level] for level in features}

    def _check_is_alone(self, call: NormCall) -> None:
        """Without any feature there is no backward pass here, for which other workers would wait."""
        is_moving = any(self.is_moving(level, call) for level in self.levels)
        is_shared = self.training and (self.uses_mini_batch or is_moving)
        if is_shared and resolve_group(call.spec.workers) is not None:
            raise NO_FEATURE.of("none", self.where, num_features=self.num_features)

    def _check_levels(self, features: Mapping[str, Tensor]) -> None:
        if not isinstance(features, Mapping):
            raise NO_MAPPING.of(type(features).__name__, self.where)

        for level, feature in features.items():
            if level not in self.levels:
                raise UNKNOWN_LEVEL.of(repr(level), self.where, levels=self.levels)
            self.check_feature(feature, level)

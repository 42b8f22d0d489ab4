"""One batch norm over the features of several levels (of an FPN, say), each level named.

A convolution that is applied to every level of a pyramid sees several domains. `LevelBatchNorm2d`
receives all of them in one call, so that it can treat them as one mini-batch or as several, and
knows each by its name: no call is counted, and a level that is left out shifts no other. Samples may be of
several domains besides, those of a batch of images at every level.

What is not here: a norm of a single feature map, which torch's BatchNorm2d already is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnext.distributed import resolve_group
from bnext.errors import ConfigError, Refusal, StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.ownership import Sources
from bnext.layers.spec import NormSpec
from bnext.layers.together import Together
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

    b is the mini-batch of level l in training, its population statistics otherwise; with domains, that of the
    sample's domain at level l. What all share lies on the layer under torch's names (`weight`, `running_mean`, ...),
    what a level, a domain or a domain at a level owns under its name (`p3.weight`, `night.weight`, `night_p3.weight`).

    Args:
        num_features: channels C.
        levels: names of the levels, for example ("p3", "p4", "p5", "p6", "p7"); in this order a
            running average that all levels share takes in their moments.
        spec: which statistics, whose population, whose affine, over which workers. Where it names domains,
            `use_domain` says that of all samples, or of each: the samples of every level are those of one batch.
        device, dtype: of its state, as torch's.

    Raises:
        ConfigError: no levels, a name twice (of a level, a domain, or one joined of both), or a name that is an
            attribute of the layer.

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

        super().__init__(num_features, spec, levels=levels, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"

    def forward(  # type: ignore[override]
        self, features: Mapping[str, Tensor], together: Together | None = None
    ) -> dict[str, Tensor]:
        """Normalize the features of some or all levels.

        Args:
            features: level name -> [N, C, H, W]; samples and sizes may differ, a level may be empty
                or absent. Levels that are given share a mini-batch if the spec says so.
            together: for `normalize_together`, which calls several norms at once.

        Returns:
            level name -> tensor of the same shape and type, in the same order.

        Raises:
            StatisticsError: an unknown level, a tensor instead of named levels, and what `BatchNorm2d` raises.
            DomainError: see `BatchNorm2d`.

        Note:
            In training the running statistics move: a population once for each mini-batch that has samples of it, one
            domain after the other, each in the order of `levels`.
        """
        self._check_levels(features)
        call = read_call(self, self._spec, self.where)
        if not features:
            self._check_is_alone(call)
            return {}

        inputs, sources = self.list_features(features, call.domain, call.spec)
        if self.domains:  # the same images at every level
            self.count_domains(call, max(map(len, inputs)))
        outputs = self.normalize_features(inputs, sources, call, together)

        present = [level for level in self.levels if level in features]
        by_level = dict(zip(present, outputs, strict=True))
        return {level: by_level[level] for level in features}

    def list_features(
        self, given: Mapping[str, Tensor], active: str | tuple[str, ...] | None, spec: NormSpec | None = None
    ) -> tuple[list[Tensor], list[Sources]]:
        """The features in the order of `levels`, and their sources; see `BatchNorm2d.list_features`."""
        levels = [level for level in self.levels if level in given]
        features = [given[level] for level in levels]

        pairs = zip(levels, features, strict=True)
        return features, [self.find_sources(level, active, feature.shape[0], spec) for level, feature in pairs]

    def find_sources(
        self, level: str, active: str | tuple[str, ...] | None, num_samples: int, spec: NormSpec | None = None
    ) -> Sources:
        """Index of the source of all samples of a level, or of each sample's; see `name_sources`."""
        number, step = self.levels.index(level), len(self.levels)
        if isinstance(active, tuple) and num_samples == 0:
            return number  # of no sample

        domains = self.find_domains(active, num_samples, spec)
        if isinstance(domains, int):
            return domains * step + number
        return tuple(domain * step + number for domain in domains)

    def _check_is_alone(self, call: NormCall) -> None:
        """Without any feature there is no backward pass here, for which other workers would wait."""
        is_moving = any(self.is_moving(source, call) for source in self.sources)
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

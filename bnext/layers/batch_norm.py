"""The one batch norm that a `NormSpec` describes, for one feature map.

The base of `LevelBatchNorm2d`, which sees several. Both sort samples into parts, those of one source (a level, a
domain, or a domain at a level) in one mini-batch. The level of a feature is its name in the call, the domain of a
sample comes from `use_domain`. Whose the state is, is in ownership.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bnext.dispatch import is_exported, is_exported_to_onnx, is_traced, is_transformed
from bnext.distributed import resolve_group
from bnext.errors import ConfigError, Refusal, StatisticsError
from bnext.functional import (
    Groups,
    Moments,
    divide_parts,
    enlarge_parts,
    group_moments,
    group_samples,
    make_index,
    normalize_mini_batch,
    normalize_parts,
    number_groups,
    part_moments,
)
from bnext.kernels import has_exact_batch_norm, joins_features, replaces_batch_norm
from bnext.layers.mini_batch import MeasuredCall, PartsCall, index_mini_batches, merge_measured, normalize_measured
from bnext.layers.ownership import Affine, DomainState, OwnedBatchNorm2d, Sources
from bnext.layers.repeated_calls import NO_CALL, Call, watch_call
from bnext.layers.single_element import may_have_single_elements, replace_single_elements, select_single_elements
from bnext.layers.spec import NormSpec
from bnext.layers.together import Together
from bnext.layers.unseen import normalize_unseen, settle_unseen
from bnext.notices import tell_once
from bnext.scope.call import NormCall, read_call

__all__ = ["BatchNorm2d", "DomainState"]

log = logging.getLogger(__name__)

TRAINING_TO_ONNX = (
    "A model in training mode is exported to ONNX: the file normalizes by its mini-batches, and holds no statistics "
    "that move (%s). Call model.eval() first for a file that normalizes as the model does at inference."
)
NO_SPEC = Refusal(ConfigError, "spec", "be a NormSpec", "For a norm by name use make_named_norm.")
NO_LEVELS = Refusal(
    ConfigError,
    "spec",
    "not be per_level or per_level_and_domain in a norm of a single feature map",
    "Use LevelBatchNorm2d, or per_domain with names.",
)
GROUPS_OF_OTHERS = Refusal(
    StatisticsError,
    "groups",
    "name one group per sample of a single feature",
    "Name the groups for the batch that reaches this norm.",
)
SIZE_BESIDE_GROUPS = Refusal(
    StatisticsError,
    "normalization_batch_size",
    "be None where samples have groups",
    "Choose the number of groups instead.",
)
WORKERS_IN_TRANSFORM = Refusal(
    StatisticsError,
    "workers",
    "be 'one' in a transform of torch.func, which cannot wait for other workers",
    "Set workers='one' for this call, or differentiate with backward().",
)
REACHED_TWICE = Refusal(
    StatisticsError, "virtual samples", "reach a norm once", "Use LevelBatchNorm2d where several features share a norm."
)


class BatchNorm2d(OwnedBatchNorm2d):
    """Batch normalization that knows which batch; by default exactly torch's.

        y = weight_s * (r * (x - mean_b) / sqrt(var_b + eps) + d) + bias_s

    s is the domain of a sample, b its mini-batch or its population, as the spec says; r = 1 and d = 0 but in
    Batch Renormalization. What domains share lies on the layer under torch's names (`weight`, `running_mean`,
    ...), what each owns under its name (`day.weight`, `day.running_mean`, ...).

    Args:
        num_features: channels C.
        spec: which statistics, whose population, whose affine, over which workers. Statistics, population
            or affine "per_domain" take the domain of the samples from `use_domain`.
        levels: for `LevelBatchNorm2d`.
        device, dtype: of its state, as torch's.

    Attributes:
        momentum: of the moving average; None: cumulative. May be changed during training, as torch's.
        r_max, d_max: limits of renorm's corrections. May be changed during training.
        path: where the layer is in its model, for messages.

    Raises:
        ConfigError: the spec is per_level; a domain has the name of an attribute; workers do not divide the world.

    Note:
        Running statistics move once per call in training, with the variance of correction 1; several groups of
        one call are merged first, and levels or domains with mini-batches of their own that share a population move it
        one after another. They do not move in `frozen_statistics`, while a backward pass computes
        activations again, for a mini-batch of less than two elements per channel, or where the spec freezes them; nor
        for one with inf or NaN, such as an overflow, which `bnext.layers.counts` counts.
        With renorm, or training="population", activations that are computed again use the statistics as moved; domain,
        groups and virtual samples are those of their own forward.
        Transforms of `torch.func` and forward-mode differentiation go through every norm, also twice. Statistics that
        move are handed in there, as torch's norm asks for, too: `functional_call(model, (parameters, buffers), x)`.
        Refused are several workers in a transform, and a second derivative outside of one where torch's own kernel
        does not do it all. Code that takes the norm for torch's fills, resets or takes away what levels or domains own
        under the norm's fields (see `OwnedField`); without running statistics the mini-batch normalizes.
        `spec` may be replaced during training (`layer.spec = layer.spec.replace(training="renorm")`) in what says
        what normalizes and over which samples; momentum and limits are attributes, `freeze_norms` freezes.
        With several workers every worker calls one collective forward and one backward, also with an empty input.

    Source:
        Ioffe and Szegedy, *Batch Normalization*, 2015, and the sources of `NormSpec`.
    """

    _last_call: Call | None = NO_CALL

    def __init__(
        self,
        num_features: int,
        spec: NormSpec | None = None,
        *,
        levels: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = NormSpec() if spec is None else spec
        if not isinstance(spec, NormSpec):
            raise NO_SPEC.of(repr(spec), "BatchNorm2d")
        if spec.has_levels and not levels:
            raise NO_LEVELS.of(spec, "BatchNorm2d")
        super().__init__(num_features, spec, levels, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [N, C, H, W]; the result has the same shape, type and memory format.

        Raises:
            StatisticsError: a wrong rank, number of channels or device, statistics that are not finite, or a
                mini-batch of a single element per channel in training.
            DomainError: no domain is active, or an unknown one, or not one per sample.
        """
        self.check_feature(input)
        call = read_call(self, self._spec, self.where)
        features, sources = self.list_features(input, call.domain, call.spec)
        if self.domains:
            self.count_domains(call, input.shape[0])
        if self._last_call is not None and self.training and not is_traced():
            self._last_call = watch_call(self, input, self._last_call)
        return self.normalize_features(features, sources, call)[0]

    def list_features(
        self, given: Any, active: str | tuple[str, ...] | None, spec: NormSpec | None = None
    ) -> tuple[list[Tensor], list[Sources]]:
        """The features that a call is given, and for each the index of all its samples or of each, see `name_sources`.

        Args:
            given: see `forward`.
            active: the domain of all samples, or that of each, see `NormCall`.
            spec: in force; None: as it is now.
        """
        return [given], [self.find_domains(active, given.shape[0], spec)]

    def number_mini_batches(self, spec: NormSpec, names: Sequence[str]) -> tuple[int, ...]:
        """For each source the mini-batch that its samples are in, by the answers of `spec`: 0 to B - 1."""
        return number_groups(tuple(self.find_owner(spec.statistics, name) for name in names))

    @property
    def uses_mini_batch(self) -> bool:
        """Whether a call in the present mode is normalized by its mini-batch."""
        return self._is_by_mini_batch(self.spec)

    def _is_by_mini_batch(self, spec: NormSpec) -> bool:
        if not self.has_population and not spec.has_frozen_statistics:  # what was frozen and is gone is missed
            return True
        if self.training:
            return spec.training != "population" and not spec.has_frozen_statistics
        return spec.inference == "mini_batch"

    def normalize_features(
        self, features: list[Tensor], sources: list[Sources], call: NormCall, together: Together | None = None
    ) -> list[Tensor]:
        """Normalize one or several features of known sources; the core of this layer and of its subclasses.

        Args:
            features: tensors [N_l, C, H_l, W_l].
            sources: for each feature the index of all its samples, or of each, see `name_sources`.
            call: what the call knows besides.
            together: calls of other norms with which this one shares collectives.
        """
        names = self.name_sources(sources)
        if names is not self.sources:
            sources = settle_unseen(self, features, sources, names, call)
        if self._is_by_mini_batch(call.spec):
            return self._normalize_by_mini_batch(features, sources, names, call, together)

        moves = any(self.is_moving(name, call) for name in names)
        outputs = self._normalize_by_population(features, sources, names, moves, call)
        if moves:
            measured = self._measure(features, sources, names, None, resolve_group(call.spec.workers), call)
            (moments,) = merge_measured([measured])
            self.move_populations(moments, measured.grouping.sources, names, call)
        return outputs

    # ---- by the population

    def _normalize_by_population(
        self, features: list[Tensor], sources: list[Sources], names: tuple[str, ...], moves: bool, call: NormCall
    ) -> list[Tensor]:
        """`moves`: the statistics will change before the backward pass."""
        indices: set[int] = set()
        for source in sources:
            indices.update((source,) if isinstance(source, int) else source)

        has_unseen = names is not self.sources
        used_names: list[str] = []
        for index in indices:
            used_names += self.list_members(names[index]) if has_unseen else (names[index],)
        self.check_kept_statistics(used_names)
        self.check_populations(used_names)

        by_images = has_unseen and call.spec.unseen not in ("mixture", "nearest")
        if all(isinstance(source, int) for source in sources) and not by_images:
            used: list[int] = sources  # type: ignore[assignment]
            affines = self.list_affines(names, used)
            return [self._infer(x, names[i], affines[i], moves) for x, i in zip(features, used, strict=True)]

        populations = self.stack_populations(names)
        weight, bias = self.stack_affines(names, populations.mean)
        parts = _to_parts(sources, weight.device)
        if by_images:
            return normalize_unseen(self, features, parts, names, (weight, bias), populations, call)
        return normalize_parts(features, parts, weight, bias, self.eps, populations)

    def _infer(self, feature: Tensor, name: str, affine: Affine, moves: bool) -> Tensor:
        """One feature by the population of its source, with torch's kernel."""
        mean, var = self.mix_populations(name)

        may_move = torch.is_grad_enabled() and not self._spec.has_frozen_statistics and not is_traced()
        if moves or may_move:
            mean, var = mean.clone(), var.clone()  # the backward pass needs those of now
        return F.batch_norm(feature, mean, var, *affine, False, 0.0, self.eps)

    # ---- by the mini-batch

    def _normalize_by_mini_batch(
        self,
        features: list[Tensor],
        sources: list[Sources],
        names: tuple[str, ...],
        call: NormCall,
        together: Together | None,
    ) -> list[Tensor]:
        spec = call.spec
        group = resolve_group(spec.workers) if self.training else None
        size = spec.normalization_batch_size if self.training and call.recorder is None else None

        if group is None and self._is_plain(features, sources, names, size, call):
            used: list[int] = sources  # type: ignore[assignment]
            affines = self.list_affines(names, used)
            if any(map(replaces_batch_norm, features)):
                return self._normalize_each(features, used, names, affines, call)
            return [self._normalize_plainly(x, names[i], affines[i], call) for x, i in zip(features, used, strict=True)]

        if self.training and is_exported_to_onnx():
            tell_once(log, "ONNX", TRAINING_TO_ONNX, self.where)
        measured = self._measure(features, sources, names, size, group, call)
        if together is None or group is None:
            return normalize_measured([measured])[0]
        return together.normalize(measured)

    def _is_plain(
        self,
        features: list[Tensor],
        sources: list[Sources],
        names: tuple[str, ...],
        size: int | None,
        call: NormCall,
    ) -> bool:
        """Whether every feature is a mini-batch of its own, and a single kernel normalizes it right and fastest."""
        if any(value is not None for value in (call.groups, call.virtual, call.recorder)) or self.momentum is None:
            return False
        if is_exported() and (not self.training or is_exported_to_onnx()):
            return False  # ONNX gets the kernel's training mode as evaluation, and a size of one element may come later
        if self.training and call.spec.training == "renorm":
            return False
        if len(features) > 1 and joins_features(features[0]):
            return False

        for feature, source in zip(features, sources, strict=True):
            if not isinstance(source, int) or (size is not None and len(feature) > size):
                return False
            has_variance = feature.numel() >= 2 * self.num_features
            if not (has_variance and (has_exact_batch_norm(feature) or replaces_batch_norm(feature))):
                return False

        if len(features) == 1:
            return True
        mini_batches = self.number_mini_batches(call.spec, names)
        return len({mini_batches[source] for source in sources}) == len(features)  # type: ignore[index]

    def _normalize_each(
        self,
        features: list[Tensor],
        sources: list[int],
        names: tuple[str, ...],
        affines: Sequence[Affine],
        call: NormCall,
    ) -> list[Tensor]:
        """Each feature by itself, and with all their moments the populations in one go."""
        pairs = [normalize_mini_batch(x, *affines[i], self.eps) for x, i in zip(features, sources, strict=True)]
        outputs, moments = zip(*pairs, strict=True)
        if self.training:
            self.move_populations(Moments(*map(torch.cat, zip(*moments, strict=True))), sources, names, call)
        return list(outputs)

    def _normalize_plainly(self, feature: Tensor, name: str, affine: Affine, call: NormCall) -> Tensor:
        if not self.training:
            return F.batch_norm(feature, None, None, *affine, True, 0.0, self.eps)

        state = self.population_state(name)
        # Torch's kernel moves copies, which a recomputation makes as well, so that it saves as many tensors.
        buffers = (state.running_mean, state.running_var)
        mean, var = (None if buffer is None else buffer.clone() for buffer in buffers)
        is_moving = mean is not None and var is not None and self.is_moving(name, call)
        if is_moving:
            self.check_can_move(state.running_mean, feature)  # type: ignore[arg-type]

        output = F.batch_norm(feature, mean, var, *affine, True, self.momentum or 0.0, self.eps)
        if is_moving:
            self.replace_statistics(state, mean, var)  # type: ignore[arg-type]
        return output

    def _measure(
        self,
        features: list[Tensor],
        sources: list[Sources],
        names: tuple[str, ...],
        size: int | None,
        group: Any,
        call: NormCall,
    ) -> MeasuredCall:
        """The parts of a call, and their moments on this worker."""
        if group is not None and is_transformed():
            raise WORKERS_IN_TRANSFORM.of(repr(call.spec.workers), self.where)

        counts = tuple(feature.shape[0] for feature in features)
        grouping = group_samples(counts, tuple(sources), self.number_mini_batches(call.spec, names), size)
        if call.groups is not None and call.recorder is None:
            self._check_groups(call.groups, counts, size)
            grouping = divide_parts(grouping, call.groups)

        # They get their gradient in `normalize_parts`; a transform is to differentiate them itself.
        parts = _to_parts(grouping.parts, features[0].device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (is_transformed() or is_exported())):
            moments = part_moments(features, parts, len(grouping.sources))
        return MeasuredCall(self, features, grouping, parts, moments, names, group, call)

    def _check_groups(self, groups: Groups, counts: tuple[int, ...], size: int | None) -> None:
        if len(counts) != 1 or counts[0] != len(groups.numbers):
            raise GROUPS_OF_OTHERS.of(f"{len(groups.numbers)} for {counts} samples", self.where)
        if size is not None:
            raise SIZE_BESIDE_GROUPS.of(size, self.where)

    def record(self, recorder: dict[str, Moments] | None, moments: Moments, names: tuple[str, ...]) -> None:
        """Take down the moments of a call, those of each source, if somebody asks for them."""
        if recorder is None:
            return
        if recorder:
            raise REACHED_TWICE.of("a second call in one forward", self.where)
        recorder.update({name: Moments(*(field[i] for field in moments)) for i, name in enumerate(names)})

    def settle(self, measured: MeasuredCall, moments: Moments) -> PartsCall:
        """The statistics of mini-batches and the affines that normalize the parts of a call.

        Args:
            measured: the call.
            moments: of its parts, over all workers that share its mini-batches.
        """
        features, grouping, call = measured.features, measured.grouping, measured.call
        part_names = measured.list_part_names()
        virtual = call.virtual
        if virtual is not None:
            moments = enlarge_parts(moments, [virtual.get(name) for name in part_names])

        # Parts of one mini-batch, the levels or domains of a shared one for example, are merged.
        owners = index_mini_batches(grouping.mini_batches, moments.mean.device)
        statistics = moments
        if owners is not None:
            statistics = group_moments(moments, owners, max(grouping.mini_batches) + 1)
        merged = statistics if virtual is None else None
        if is_exported():
            statistics = select_single_elements(self, statistics, moments, grouping, part_names, call)
        elif may_have_single_elements(features, grouping, measured.group is not None):
            statistics = replace_single_elements(self, statistics, moments, grouping, part_names, call)

        weight, bias = self.stack_affines(part_names, moments.mean)
        if self.training and call.spec.training == "renorm" and self.has_population:
            weight, bias = self._renormalize(weight, bias, statistics, owners, part_names)
        return PartsCall(features, measured.parts, weight, bias, statistics, grouping.mini_batches, merged)

    def move_by_mini_batch(self, measured: MeasuredCall, moments: Moments, merged: Moments | None) -> None:
        """Let the populations take in a call; its virtual samples count once for a source, in however many groups.

        Args:
            measured, moments: see `settle`.
            merged: see `PartsCall`.
        """
        names, call = measured.names, measured.call
        sources = list(measured.grouping.sources)
        if call.virtual is not None:
            owners = make_index(measured.grouping.sources, moments.mean.device)
            sources = list(range(max(sources) + 1))
            moments = group_moments(moments, owners, len(sources))  # first: a group may be empty
            moments = enlarge_parts(moments, [call.virtual.get(names[source]) for source in sources])

        known = None if merged is None else (measured.grouping.mini_batches, merged)
        self.move_populations(moments, sources, names, call, known)

    def _renormalize(
        self, weight: Tensor, bias: Tensor, statistics: Moments, owners: Tensor | None, part_names: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Batch Renormalization as an affine: weight r, bias + weight d; r and d are constants to the gradient."""
        self.check_populations(part_names)
        population = self.stack_populations(part_names)
        mean, var = statistics.mean.detach(), statistics.var.detach()
        if owners is not None:
            mean, var = mean[owners], var[owners]

        std = (population.var + self.eps).sqrt()
        r = ((var + self.eps).sqrt() / std).clamp(1 / self.r_max, self.r_max)
        d = ((mean - population.mean) / std).clamp(-self.d_max, self.d_max)
        return weight * r, bias + weight * d


def _to_parts(parts: Sequence[Sources | Tensor], device: torch.device) -> list[int | Tensor]:
    return [make_index(part, device) if isinstance(part, tuple) else part for part in parts]

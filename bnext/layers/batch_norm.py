"""The one batch norm that a `NormSpec` describes, for one feature map.

The base of `LevelBatchNorm2d`, which sees several. Both sort samples into parts (the samples of one
domain in one mini-batch) and differ only in where the names come from: for levels from the call, for
domains from `use_domain`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnext.distributed import all_gather_stacked, all_reduce_sum, resolve_group
from bnext.domain import get_active_domain
from bnext.errors import ConfigError, DomainError, StatisticsError
from bnext.functional import (
    Grouping,
    Moments,
    group_moments,
    group_samples,
    merge_moments,
    normalize_parts,
    part_moments,
    update_running_statistics,
)
from bnext.layers.scopes import is_recomputing
from bnext.layers.spec import NormSpec

__all__ = ["BatchNorm2d", "DomainState"]

Domains = int | tuple[int, ...]  # of all samples of a feature, or of each


class DomainState(nn.BatchNorm2d):
    """What one level or domain owns of a norm: its affine, its running statistics, or both. It is never called.

    A BatchNorm2d by type, so that optimizers exempt its affine from weight decay as every norm's.
    """

    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("DomainState must not be called; it holds one domain's part of a batch norm.")


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that knows which batch; by default exactly torch's.

        y = weight_d * (r * (x - mean_b) / sqrt(var_b + eps) + d) + bias_d

    b is the mini-batch of a sample or its population, as the spec says; r = 1 and d = 0 but in Batch
    Renormalization. What domains share lies on the layer under torch's names (`weight`, `running_mean`, ...),
    what each owns under its name (`day.weight`, `day.running_mean`, ...).

    Args:
        num_features: channels C.
        spec: which statistics, whose population, whose affine, over which workers. Statistics, population
            or affine "per_domain" take the domain of the samples from `use_domain`.

    Attributes:
        momentum: of the moving average; None: cumulative. May be changed during training, as torch's.
        r_max, d_max: limits of renorm's corrections. May be changed during training.
        path: where the layer is in its model, for messages.

    Raises:
        ConfigError: the spec is per_level; a domain has the name of an attribute; workers do not divide the world.

    Note:
        Running statistics move once per call in training, with the variance of correction 1; several groups of
        one call are merged first. They do not move in `frozen_statistics`, while a backward pass computes
        activations again, for a mini-batch of less than two elements per channel, or where the spec freezes them.
        With renorm, or training="population", activations that are computed again use the statistics as moved.
        With several workers every worker calls one collective forward and one backward, also with an empty input.

    Source:
        Ioffe and Szegedy, *Batch Normalization*, 2015, and the sources of `NormSpec`.
    """

    def __init__(self, num_features: int, spec: NormSpec | None = None, *, levels: Sequence[str] = ()) -> None:
        spec = spec or NormSpec()
        super().__init__(
            num_features,
            eps=spec.eps,
            momentum=None if spec.average == "cumulative" else spec.momentum,
            affine=spec.affine == "shared",
            track_running_stats=spec.population == "shared",
        )
        self.spec = spec
        self.r_max, self.d_max = spec.r_max, spec.d_max
        self.path = ""
        self.domains = tuple(levels) or spec.domains
        self.virtual: dict[str, Moments] | None = None  # see `virtual_samples`
        self.recording: dict[str, Moments] | None = None
        self._is_checked = self._has_told = False
        if spec.owner == "per_level" and not levels:
            raise ConfigError(
                f"spec must not be per_level in a norm of a single feature map; got {spec} (BatchNorm2d). "
                f"Use LevelBatchNorm2d, or per_domain with names."
            )
        self._add_domain_states()
        if spec.has_frozen_affine:
            self.requires_grad_(False)
        resolve_group(spec.workers)  # makes it, and refuses a number that does not fit, while the model is built

    def _add_domain_states(self) -> None:
        for name in self.domains:
            if self.domains.count(name) > 1 or hasattr(self, name) or not name or "." in name:
                raise ConfigError(
                    f"levels and domains must be distinct, without dots, and no attribute of the layer; got "
                    f"{self.domains!r} ({type(self).__name__}, {name!r}). Choose another name."
                )
        owns_affine, owns_population = (
            answer.startswith("per_") for answer in (self.spec.affine, self.spec.population)
        )
        if owns_affine or owns_population:
            for name in self.domains:
                state = DomainState(self.num_features, self.eps, self.momentum, owns_affine, owns_population)
                self.add_module(name, state)

    def extra_repr(self) -> str:
        default = NormSpec()
        answers = {name: value for name, value in vars(self.spec).items() if value != getattr(default, name)}
        return ", ".join([str(self.num_features), *(f"{name}={value!r}" for name, value in answers.items())])

    def train(self, mode: bool = True) -> BatchNorm2d:
        self._is_checked = False
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [N, C, H, W]; the result has the same shape, type and memory format.

        Raises:
            StatisticsError: a wrong rank, number of channels or device, statistics that are not finite, or a
                mini-batch of a single element per channel in training.
            DomainError: no domain is active, or an unknown one, or not one per sample.
        """
        self.check_feature(input)
        if not self.domains:
            return self.normalize_features([input], [0], ("",))[0]
        return self.normalize_features([input], [self._find_domains(len(input))], self.domains)[0]

    # ---- who owns what

    def population_state(self, domain: str = "") -> nn.BatchNorm2d:
        """The module whose running statistics normalize this domain: the layer, or the domain's own."""
        return self if not self.spec.population.startswith("per_") else self.get_submodule(domain)  # type: ignore[return-value]

    def affine_state(self, domain: str = "") -> nn.BatchNorm2d:
        """The module whose weight and bias scale and shift this domain."""
        return self if not self.spec.affine.startswith("per_") else self.get_submodule(domain)  # type: ignore[return-value]

    def populations(self) -> Iterator[tuple[tuple[str, ...], nn.BatchNorm2d]]:
        """Each set of population statistics, with the levels or domains that it normalizes."""
        if self.spec.population.startswith("per_"):
            for domain in self.domains:
                yield (domain,), self.population_state(domain)
        elif self.spec.population == "shared":
            yield self.domains, self

    def _find_domains(self, num_samples: int) -> Domains:
        """Index of the active domain, or of each sample's."""
        active = get_active_domain()
        if isinstance(active, tuple) and len(active) != num_samples:
            raise DomainError(
                f"use_domain must name one domain per sample; got {len(active)} names for {num_samples} samples "
                f"({self.where}). Name one domain for all of them, or one for each."
            )
        if isinstance(active, tuple):
            return tuple(self._find_domain(name) for name in active)
        return self._find_domain(active)

    def _find_domain(self, name: str | None) -> int:
        found = name if name in self.domains else self.spec.fallback_domain
        if found is None:
            what = "No domain is active" if name is None else f"Domain {name!r} is unknown"
            raise DomainError(
                f"{what} in {self.where}, which has the domains {self.domains}. Wrap the call in "
                f"`with use_domain(...)`, or set fallback_domain (in a config MODEL.BNEXT.DOMAINS.FALLBACK)."
            )
        return self.domains.index(found)

    # ---- what normalizes

    @property
    def where(self) -> str:
        """Name of the layer in messages."""
        return self.path or type(self).__name__

    @property
    def uses_mini_batch(self) -> bool:
        """Whether a call in the present mode is normalized by its mini-batch."""
        if self.training:
            return self.spec.training != "population" and not self.spec.has_frozen_statistics
        return self.spec.inference == "mini_batch"

    def normalize_features(
        self, features: list[Tensor], domains: list[Domains], names: tuple[str, ...]
    ) -> list[Tensor]:
        """Normalize one or several features, each of known domains; the core of this layer and of its subclass.

        Args:
            features: tensors [N_l, C, H_l, W_l].
            domains: for each feature the index in `names` of all its samples, or of each.
            names: of the domains that may occur.
        """
        if self.uses_mini_batch:
            return self._normalize_by_mini_batch(features, domains, names)
        moves = self.training and any(self._is_moving(name) for name in names)
        outputs = self._normalize_by_population(features, domains, names, keep=moves)
        if moves:
            moments, grouping = self._collect_moments(features, domains, names, None, resolve_group(self.spec.workers))
            self._move_populations(moments, grouping, names)
        return outputs

    def _normalize_by_population(
        self, features: list[Tensor], domains: list[Domains], names: tuple[str, ...], keep: bool
    ) -> list[Tensor]:
        """`keep`: the statistics will move before the backward pass, which needs those of now."""
        self._check_populations(names)
        if all(isinstance(domain, int) for domain in domains):
            outputs = []
            for feature, domain in zip(features, domains, strict=True):
                population, affine = (of(names[domain]) for of in (self.population_state, self.affine_state))  # type: ignore[index]
                mean, var = population.running_mean, population.running_var
                mean, var = (mean.clone(), var.clone()) if keep else (mean, var)
                outputs.append(
                    F.batch_norm(feature, mean, var, affine.weight, affine.bias, False, 0.0, self.eps)
                )
            return outputs
        populations = self._stack_populations(range(len(names)), names)
        constant = populations._replace(count=torch.full_like(populations.count, float("inf")))
        weight, bias = self._stack_affines(range(len(names)), names, constant.mean)
        index = torch.arange(len(names), device=weight.device)
        return normalize_parts(features, _to_parts(domains, weight.device), weight, bias, self.eps, constant, index)

    def _normalize_by_mini_batch(
        self, features: list[Tensor], domains: list[Domains], names: tuple[str, ...]
    ) -> list[Tensor]:
        spec = self.spec
        group = resolve_group(spec.workers) if self.training else None
        size = spec.normalization_batch_size if self.training and self.recording is None else None
        if group is None and self._is_plain(features, domains, size):
            return [self._normalize_plainly(x, names[d]) for x, d in zip(features, domains, strict=True)]  # type: ignore[index]
        moments, grouping = self._collect_moments(features, domains, names, size, group)
        owners = torch.tensor(grouping.mini_batches, device=moments.mean.device)
        statistics = group_moments(moments, owners, max(grouping.mini_batches) + 1)
        statistics = self._replace_single_elements(features, statistics, moments, grouping, names)
        weight, bias = self._stack_affines(grouping.domains, names, moments.mean)
        if self.training and spec.training == "renorm":
            weight, bias = self._renormalize(weight, bias, statistics, owners, grouping, names)
        parts = _to_parts(grouping.parts, moments.mean.device)
        reduce = partial(all_reduce_sum, group=group) if group else None
        outputs = normalize_parts(features, parts, weight, bias, self.eps, statistics, owners, reduce)
        self._move_populations(moments, grouping, names)
        return outputs

    def _is_plain(self, features: list[Tensor], domains: list[Domains], size: int | None) -> bool:
        """Whether every feature is a mini-batch of its own, and torch's kernel normalizes it right and fastest."""
        if self.virtual is not None or self.recording is not None or self.momentum is None:
            return False
        if self.training and self.spec.training == "renorm":
            return False
        is_alone = len(features) == 1 or self.spec.statistics != "shared"
        return is_alone and all(
            isinstance(domain, int) and (size is None or len(x) <= size) and x.numel() >= 2 * self.num_features
            # On CPU torch's statistics lose digits in channels_last and of half types; see batch_moments.
            and (x.is_cuda or (x.is_contiguous() and x.dtype in (torch.float32, torch.float64)))
            for x, domain in zip(features, domains, strict=True)
        )

    def _normalize_plainly(self, feature: Tensor, name: str) -> Tensor:
        state, affine, moves = self.population_state(name), self.affine_state(name), self._is_moving(name)
        mean, var = state.running_mean, state.running_var
        if moves:
            state.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        elif mean is not None:  # copies to be thrown away: a recomputation must save as many tensors as the forward
            mean, var = mean.clone(), var.clone()  # type: ignore[union-attr]
        return F.batch_norm(feature, mean, var, affine.weight, affine.bias, True, self.momentum or 0.0, self.eps)

    def _collect_moments(
        self, features: list[Tensor], domains: list[Domains], names: tuple[str, ...], size: int | None, group: Any
    ) -> tuple[Moments, Grouping]:
        """Moments of the parts over all workers of the group, virtual samples included; and what the parts are."""
        shares = self.spec.statistics == "shared"
        counts = tuple(len(feature) for feature in features)
        grouping = group_samples(counts, tuple(domains), len(names), shares, size)
        with torch.no_grad():
            parts = _to_parts(grouping.parts, features[0].device)
            moments = part_moments(features, parts, len(grouping.domains))
            if group is not None:
                moments = _merge_over_workers(moments, group)
            self._record(moments, names)
            return self._add_virtual_samples(moments, grouping, names), grouping

    def _record(self, moments: Moments, names: tuple[str, ...]) -> None:
        if self.recording is None:
            return
        if self.recording:
            raise StatisticsError(
                f"virtual samples must reach a norm once; got a second call in one forward ({self.where}). "
                f"Use LevelBatchNorm2d where several features share a norm."
            )
        self.recording.update({name: Moments(*(f[i] for f in moments)) for i, name in enumerate(names)})

    def _add_virtual_samples(self, moments: Moments, grouping: Grouping, names: tuple[str, ...]) -> Moments:
        if self.virtual is None:
            return moments
        nothing = Moments(*(torch.zeros_like(field[0]) for field in moments))
        extra = [self.virtual.get(names[domain], nothing) for domain in grouping.domains]
        pairs = [torch.stack([own, torch.stack(new)]) for own, new in zip(moments, zip(*extra, strict=True), strict=True)]
        return merge_moments(Moments(*pairs))

    def _renormalize(
        self, weight: Tensor, bias: Tensor, statistics: Moments, owners: Tensor, grouping: Grouping, names: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Batch Renormalization as an affine: weight r, bias + weight d; r and d are constants to the gradient."""
        population = self._stack_populations(grouping.domains, names)
        std = (population.var + self.eps).sqrt()
        r = ((statistics.var[owners] + self.eps).sqrt() / std).clamp(1 / self.r_max, self.r_max)
        d = ((statistics.mean[owners] - population.mean) / std).clamp(-self.d_max, self.d_max)
        return weight * r, bias + weight * d

    def _replace_single_elements(
        self, features: list[Tensor], statistics: Moments, moments: Moments, grouping: Grouping, names: tuple[str, ...]
    ) -> Moments:
        """One element has no variance: an error, or the population's statistics."""
        # Counts lie on the device; they are read only where a sample has a single position, or none has any here.
        if all(x.shape[2] * x.shape[3] > 1 and len(x) > 0 for x in features):
            return statistics
        alone = (statistics.count == 1).nonzero().flatten().tolist()
        for batch in alone:
            part = next(p for p, b in enumerate(grouping.mini_batches) if b == batch and moments.count[p] == 1)
            state = self.population_state(names[grouping.domains[part]])
            self._say_single_element(names[grouping.domains[part]], has_population=state.running_mean is not None)
            statistics.mean[batch], statistics.var[batch] = state.running_mean, state.running_var
            statistics.count[batch] = float("inf")  # to the gradient they are constants
        return statistics

    def _say_single_element(self, name: str, has_population: bool) -> None:
        where = ", ".join(filter(None, [self.where, name]))
        if not has_population or (self.training and self.spec.single_element == "error"):
            raise StatisticsError(
                f"a mini-batch must hold more than 1 element per channel in training; got 1 ({where}). Use larger images, "
                f"more samples, statistics shared over levels or workers, or single_element='population'."
            )
        if not self._has_told:
            self._has_told = True
            logging.getLogger(__name__).warning(
                "A mini-batch of a single element per channel was normalized by the population statistics (%s). "
                "This is said once.",
                where,
            )

    # ---- state

    def _stack_affines(self, domains: Sequence[int], names: tuple[str, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of each part, [P, C]."""
        if self.spec.affine == "none":
            return torch.ones_like(like[:1]).expand(len(domains), -1), torch.zeros_like(like[:1]).expand(len(domains), -1)
        if self.spec.affine == "shared":
            return self.weight.expand(len(domains), -1), self.bias.expand(len(domains), -1)
        states = [self.affine_state(names[domain]) for domain in domains]
        return torch.stack([state.weight for state in states]), torch.stack([state.bias for state in states])

    def _stack_populations(self, domains: Sequence[int], names: tuple[str, ...]) -> Moments:
        """Running statistics of each part, [P, C]; a copy, as they may move before the backward pass."""
        states: list[Any] = [self.population_state(names[domain]) for domain in domains]
        mean = torch.stack([state.running_mean for state in states])
        var = torch.stack([state.running_var for state in states])
        return Moments(mean.new_ones(len(states)), mean, var)

    def _is_moving(self, name: str) -> bool:
        if not self.training or self.spec.has_frozen_statistics or self.spec.population == "none":
            return False
        return self.population_state(name).track_running_stats and not is_recomputing()

    @torch.no_grad()
    def _move_populations(self, moments: Moments, grouping: Grouping, names: tuple[str, ...]) -> None:
        """One update per mini-batch that was shared, or one per domain, in their order; groups are merged first."""
        if not any(self._is_moving(name) for name in names):
            return
        is_one = self.spec.statistics == "shared" and self.spec.population == "shared"
        units = [0 if is_one else domain for domain in grouping.domains]
        merged = group_moments(moments, torch.tensor(units, device=moments.mean.device), max(units) + 1)
        for unit in range(max(units) + 1):
            state: Any = self.population_state(names[unit])
            own = Moments(*(field[unit] for field in merged))
            tracked = state.num_batches_tracked
            momentum = self.momentum if self.momentum is not None else 1 / (tracked + 1).to(own.mean.dtype)
            mean, var = update_running_statistics(state.running_mean, state.running_var, own, momentum)
            state.running_mean.copy_(mean)
            state.running_var.copy_(var)
            tracked.add_((own.count >= 2).to(tracked.dtype))

    # ---- checks

    def check_feature(self, feature: Tensor, name: str = "") -> None:
        """Rank, channels and device of an input."""
        where = ", ".join(filter(None, [self.where, name]))
        if feature.dim() != 4 or feature.shape[1] != self.num_features:
            raise StatisticsError(
                f"features must be [N, {self.num_features}, H, W]; got {list(feature.shape)} ({where}). "
                f"Check the channels of the layer before it."
            )
        own = next((tensor for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None), None)
        if own is not None and own.device != feature.device:
            raise StatisticsError(
                f"features must be on the device of the norm, {own.device}; got {feature.device} ({where}). "
                f"Move the model or the images."
            )

    def _check_populations(self, names: tuple[str, ...]) -> None:
        """Finite, and no negative variance. Once after every change of mode: it waits for the device."""
        if self._is_checked or torch.compiler.is_compiling():
            return
        for name in names:
            state: Any = self.population_state(name)
            is_right = torch.isfinite(state.running_mean) & torch.isfinite(state.running_var) & (state.running_var >= 0)
            if not is_right.all():
                channel = int((~is_right).nonzero()[0])
                where = ", ".join(filter(None, [self.where, name]))
                raise StatisticsError(
                    f"running statistics must be finite and the variance not negative; got mean "
                    f"{float(state.running_mean[channel])} and variance {float(state.running_var[channel])} in channel "
                    f"{channel} ({where}). Re-estimate them with recompute_population_statistics, and look for the "
                    f"batch that spoiled them."
                )
        self._is_checked = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_checked = False
        super()._load_from_state_dict(*args, **kwargs)


def _to_parts(parts: Sequence[Domains], device: torch.device) -> list[int | Tensor]:
    return [part if isinstance(part, int) else torch.tensor(part, dtype=torch.long, device=device) for part in parts]


def _merge_over_workers(moments: Moments, group: Any) -> Moments:
    num_channels = moments.mean.shape[1]
    message = torch.cat([moments.count.unsqueeze(1), moments.mean, moments.var], dim=1)
    gathered = all_gather_stacked(message, group)
    count, mean, var = gathered.split([1, num_channels, num_channels], dim=-1)
    return merge_moments(Moments(count.squeeze(-1), mean, var))

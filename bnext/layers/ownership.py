"""Who owns what of a batch norm: the layer, or each of its levels or domains; and how populations move.

The lower half of `BatchNorm2d`: state and its checks. What normalizes is in batch_norm.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bnext.distributed import resolve_group
from bnext.errors import ConfigError, DomainError, Refusal, StatisticsError
from bnext.functional import Moments, group_moments, make_index, update_running_statistics
from bnext.layers.spec import NormSpec
from bnext.scope.call import NormCall
from bnext.scope.record import get_record
from bnext.tracing import is_traced

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DomainState", "Domains", "OwnedBatchNorm2d", "check_statistics"]

NO_DOMAIN_NAME = Refusal(
    ConfigError,
    "levels and domains",
    "be distinct, without dots, and no attribute of the layer",
    "Choose another name.",
)
OTHER_STATE = Refusal(
    ConfigError,
    "{name} of a norm's spec",
    "stay what it was built with, {built!r}",
    "Use convert_norm, which carries the state over.",
)
NOT_ONE_PER_SAMPLE = Refusal(
    DomainError, "use_domain", "name one domain per sample", "Name one domain for all of them, or one for each."
)
BROKEN_STATISTICS = Refusal(
    StatisticsError,
    "running statistics",
    "be finite and the variance not negative",
    "Re-estimate them with recompute_population_statistics{remedy}.",
)

Domains = int | tuple[int, ...]  # of all samples of a feature, or of each
Affine = tuple[Tensor | None, Tensor | None]

# Answers of a spec that say which state there is.
_STATE = ("population", "affine", "domains")


class DomainState(nn.BatchNorm2d):
    """State of one level or domain of a norm: its affine, its running statistics, or both. It is never called.

    A BatchNorm2d by type, so that optimizers exempt its affine from weight decay as every norm's.
    """

    heeds_record = True

    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("DomainState must not be called; it holds one domain's part of a batch norm.")


class OwnedBatchNorm2d(nn.BatchNorm2d):
    """State of a batch norm by its spec; see `BatchNorm2d`."""

    heeds_record = True  # what a call knows besides its tensors: see `bnext.scope.record`
    _spec: NormSpec = None  # type: ignore[assignment]  # until it is built

    def __init__(self, num_features: int, spec: NormSpec, domains: Sequence[str]) -> None:
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
        self.domains = tuple(domains)
        self._checked: dict[str, tuple[int, int]] = {}  # name -> versions of mean and variance when they were right

        self._add_domain_states()
        if spec.has_frozen_affine:
            self.requires_grad_(False)
        resolve_group(spec.workers)  # makes it, and refuses a number that does not fit, while the model is built

    def _add_domain_states(self) -> None:
        for name in self.domains:
            is_name = isinstance(name, str) and name and "." not in name
            if not is_name or self.domains.count(name) > 1 or hasattr(self, name):
                raise NO_DOMAIN_NAME.of(repr(self.domains), f"{type(self).__name__}, {name!r}")

        has_affine, has_population = (answer.startswith("per_") for answer in (self.spec.affine, self.spec.population))
        for name in self.domains if has_affine or has_population else ():
            state = DomainState(self.num_features, self.eps, self.momentum, has_affine, has_population)
            self.add_module(name, state)

    @property
    def spec(self) -> NormSpec:
        """The answers in force; during a training others may be set, but for those that say who owns what."""
        return cast(NormSpec, get_record().specs.get(self, self._spec))

    @spec.setter
    def spec(self, spec: NormSpec) -> None:
        for name in _STATE if self._spec is not None else ():
            if getattr(spec, name) != getattr(self._spec, name):
                raise OTHER_STATE.of(repr(getattr(spec, name)), self.where, name=name, built=getattr(self._spec, name))
        self._spec = spec

    @property
    def where(self) -> str:
        """Name of the layer in messages."""
        return self.path or type(self).__name__

    def name_place(self, name: str) -> str:
        """The layer and one of its levels or domains, in messages."""
        return f"{self.where}, {name}" if name else self.where

    def extra_repr(self) -> str:
        default = NormSpec()
        answers = {name: value for name, value in vars(self.spec).items() if value != getattr(default, name)}
        return ", ".join([str(self.num_features), *(f"{name}={value!r}" for name, value in answers.items())])

    # ---- state

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for state in self._list_states():
            state.reset_running_stats()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for state in self._list_states():
            state.reset_parameters()

    def _list_states(self) -> list[DomainState]:
        return [module for module in self.children() if isinstance(module, DomainState)]

    def population_state(self, domain: str = "") -> nn.BatchNorm2d:
        """The module whose running statistics normalize this level or domain: the layer, or its own."""
        return self.get_submodule(domain) if self._spec.population.startswith("per_") else self  # type: ignore[return-value]

    def affine_state(self, domain: str = "") -> nn.BatchNorm2d:
        """The module whose weight and bias scale and shift this level or domain."""
        return self.get_submodule(domain) if self._spec.affine.startswith("per_") else self  # type: ignore[return-value]

    def populations(self) -> Iterator[tuple[tuple[str, ...], nn.BatchNorm2d]]:
        """Each set of population statistics, with the levels or domains that it normalizes."""
        if self._spec.population.startswith("per_"):
            for domain in self.domains:
                yield (domain,), self.population_state(domain)
        elif self._spec.population == "shared":
            yield self.domains, self

    def stack_affines(self, names: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias for each name, [P, C]; `like` gives type and device where there is no affine."""
        size = (len(names), self.num_features)
        if self._spec.affine == "none":
            return like.new_ones(size), like.new_zeros(size)
        if self._spec.affine == "shared":
            return self.weight.expand(size), self.bias.expand(size)

        states = [self.affine_state(name) for name in names]
        return torch.stack([state.weight for state in states]), torch.stack([state.bias for state in states])

    def list_affines(self, names: Sequence[str], used: Sequence[int]) -> list[Affine]:
        """Weight and bias for each name, of which `used` are needed.

        Those that are not needed get a gradient of zero, as elsewhere: DistributedDataParallel waits for them.
        """
        states = [self.affine_state(name) for name in names]
        is_owned = self._spec.affine.startswith("per_")
        if not is_owned or len(set(used)) == len(names) or not torch.is_grad_enabled():
            return [(state.weight, state.bias) for state in states]

        weight, bias = self.stack_affines(names, states[0].weight)
        return list(zip(weight.unbind(), bias.unbind(), strict=True))

    def stack_populations(self, names: Sequence[str]) -> Moments:
        """Running statistics for each name, [P, C]; a copy, as they may move before the backward pass.

        Their count is infinity: to the gradient they are constants.
        """
        states: list[Any] = [self.population_state(name) for name in names]
        mean = torch.stack([state.running_mean for state in states])
        var = torch.stack([state.running_var for state in states])
        return Moments(mean.new_full((len(states),), float("inf")), mean, var)

    # ---- domains of a call

    def find_domains(self, active: str | tuple[str, ...] | None, num_samples: int) -> Domains:
        """Index, in `domains`, of the domain of all samples, or of each sample's; 0 without domains."""
        if not self.domains:
            return 0
        if not isinstance(active, tuple):
            return self._find_domain(active)

        if len(active) != num_samples:
            raise NOT_ONE_PER_SAMPLE.of(f"{len(active)} names for {num_samples} samples", self.where)
        return tuple(self._find_domain(name) for name in active)

    def _find_domain(self, name: str | None) -> int:
        known = name if name in self.domains else self._spec.fallback_domain
        if known is None:
            subject = "No domain is active" if name is None else f"Domain {name!r} is unknown"
            raise DomainError(
                f"{subject} in {self.where}, which has the domains {self.domains}. Wrap the call in "
                f"`with use_domain(...)`, or set fallback_domain (in a config MODEL.BNEXT.DOMAINS.FALLBACK)."
            )
        return self.domains.index(known)

    # ---- populations that move

    def is_moving(self, name: str, call: NormCall) -> bool:
        """Whether a call moves the running statistics of a level or domain."""
        if not (self.training and call.moves) or call.spec.has_frozen_statistics or call.spec.population == "none":
            return False
        return self.population_state(name).track_running_stats

    @torch.no_grad()
    def move_populations(
        self, moments: Moments, domains: Sequence[int], names: tuple[str, ...], call: NormCall
    ) -> None:
        """One update per mini-batch that was shared, or one per domain, in their order; groups are merged first.

        Args:
            moments: of parts of the samples, [P].
            domains: for each part the index of its domain in `names`.
            names: of the domains that may occur.
            call: what the call knows.
        """
        if not any(self.is_moving(name, call) for name in names):
            return

        is_one = call.spec.statistics == "shared" and call.spec.population == "shared"
        units = [0 if is_one else domain for domain in domains]
        num_units = max(units) + 1
        if units != list(range(len(units))):
            moments = group_moments(moments, make_index(tuple(units), moments.mean.device), num_units)

        for unit in range(num_units):
            if is_one or self.is_moving(names[unit], call):
                self._move(names[unit], Moments(*(field[unit] for field in moments)))

    def _move(self, name: str, moments: Moments) -> None:
        """Let one population take in the moments of a mini-batch, [C]."""
        state: Any = self.population_state(name)
        tracked = state.num_batches_tracked
        momentum = self.momentum if self.momentum is not None else 1 / (tracked + 1).to(moments.mean.dtype)
        mean, var = update_running_statistics(state.running_mean, state.running_var, moments, momentum)

        # Through .data, as torch's kernel does: another call's graph may hold the buffers, and not need them.
        state.running_mean.data.copy_(mean)
        state.running_var.data.copy_(var)
        tracked.add_((moments.count >= 2).to(tracked.dtype))

    # ---- checks

    def train(self, mode: bool = True) -> Self:
        self._checked = {}
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checked = {}
        super()._load_from_state_dict(*args, **kwargs)

    def check_feature(self, feature: Tensor, name: str = "") -> None:
        """Rank, channels, device and type of an input."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # which takes sizes for tensors
            return

        shape = f"[N, {self.num_features}, H, W]"
        state = self._find_tensor()
        if not isinstance(feature, Tensor):
            rule, got = f"be a tensor {shape}", type(feature).__name__
            remedy = "Pass the output of the layer before it."
        elif feature.dim() != 4 or feature.shape[1] != self.num_features:
            rule, got = f"be {shape}", str(list(feature.shape))
            remedy = "Check the channels of the layer before it."
        elif state is not None and state.device != feature.device:
            rule, got = f"be on the device of the norm, {state.device}", str(feature.device)
            remedy = "Move the model or the images."
        elif not _fits_type(feature.dtype, None if state is None else state.dtype):
            rule = f"be of the norm's type, {'a floating one' if state is None else state.dtype}, or half of float32"
            got, remedy = str(feature.dtype), "Convert the images or the model."
        else:
            return

        raise StatisticsError.of("features", rule, got=got, where=self.name_place(name), remedy=remedy)

    def _find_tensor(self) -> Tensor | None:
        """A parameter or a buffer, which says type and device; None: there is none."""
        for module in (self, *self._list_states()):
            for tensor in (module.weight, module.running_mean):
                if tensor is not None:
                    return tensor
        return None

    def check_populations(self, names: Sequence[str]) -> None:
        """Finite, and no negative variance.

        It waits for the device, so it is done once after a change of mode, a load, or, at inference, somebody's write.
        """
        if is_traced():
            return

        for name in set(names):
            state: Any = self.population_state(name)
            mean, var = state.running_mean, state.running_var
            versions = (0, 0) if mean.is_inference() else (mean._version, var._version)
            if self._checked.get(name) == versions or (self.training and name in self._checked):
                continue  # in training not at every write: DistributedDataParallel may broadcast buffers in each step

            check_statistics(mean, var, self.name_place(name), "; look for the batch that spoiled them")
            self._checked[name] = versions


def check_statistics(mean: Tensor, var: Tensor, where: str, remedy: str) -> None:
    """Refuse running statistics, [C] each, that are not finite, or whose variance is negative. It waits for the device.

    Args:
        where: the norm, for the message.
        remedy: what the message says after the advice to re-estimate them.
    """
    is_right = torch.isfinite(mean) & torch.isfinite(var) & (var >= 0)
    if is_right.all():
        return

    channel = int((~is_right).nonzero()[0])
    raise BROKEN_STATISTICS.of(
        f"mean {float(mean[channel])} and variance {float(var[channel])} in channel {channel}", where, remedy=remedy
    )


def _fits_type(feature: torch.dtype, state: torch.dtype | None) -> bool:
    """Whether a norm of a type can take a feature of another."""
    if not feature.is_floating_point:
        return False
    is_half = feature in (torch.float16, torch.bfloat16) and state == torch.float32
    return state is None or feature == state or is_half

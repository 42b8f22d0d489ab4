"""Who owns what of a batch norm: the layer, its levels, its domains, or each pair; and how populations move.

The lower half of `BatchNorm2d`: state and its checks. What normalizes is in batch_norm.py.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from bnext.dispatch import has_numbers, is_exported, is_ordinary, is_traced, is_transformed, is_under_mode, is_wrapped
from bnext.distributed import resolve_group
from bnext.errors import ConfigError, DomainError, Refusal, StatisticsError
from bnext.functional import (
    Moments,
    find_finite,
    group_moments,
    make_index,
    merge_moments,
    number_groups,
    update_running_statistics,
)
from bnext.layers.counts import UnseenCount, counts_of
from bnext.layers.folded_norm import refuse_folded_state
from bnext.layers.kept import KeptBatchNorm2d
from bnext.layers.loading import convert_in_place
from bnext.layers.norm_form import AFFINE, POPULATION, form_of_spec
from bnext.layers.owned_fields import OwnedField
from bnext.layers.sources import Source, drop_domains, is_owned, is_per_domain, list_sources, map_owners, name_groups
from bnext.layers.spec import OWNED, NormSpec
from bnext.layers.unseen import UNSEEN, is_unseen
from bnext.notices import tell_once
from bnext.scope.call import NormCall
from bnext.scope.record import get_record

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DomainState", "OwnedBatchNorm2d", "Sources", "check_statistics"]

log = logging.getLogger(__name__)

NO_NAME = Refusal(
    ConfigError,
    "levels and domains",
    "be distinct, also where they are joined as domain_level, without dots, and no attribute of the layer",
    "Choose another name.",
)
UNKNOWN_LEVEL_OF_GROUP = Refusal(
    ConfigError, "level_groups", "name levels of the norm, {levels}", "Name some of them, and each once."
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
NAME_THE_DOMAIN = (
    "Wrap the call in `with use_domain(...)`, or give its images a domain: a data set in DATASETS.DOMAINS or with its "
    "registration, a record in its key `domain`."
)
CHOOSE_A_RULE = (
    "Or say with MODEL.BNEXT.DOMAINS.UNSEEN, in code with NormSpec's `unseen`, what normalizes such images at "
    "inference: the 'mixture' of all domains, a 'blend' of it and the image's own statistics, or another rule."
)
FALLBACK = "%s are taken for the fallback domain %r (first in %s), and share its statistics and affine."
BROKEN_STATISTICS = Refusal(
    StatisticsError,
    "running statistics",
    "be finite and the variance not negative",
    "Re-estimate them with recompute_population_statistics{remedy}.",
)
NO_STATISTICS = Refusal(
    StatisticsError,
    "running statistics",
    "be there for all levels and domains, or for none, which are then normalized by their mini-batches",
    "Set running_mean and running_var to None in every module of the norm, or in none.",
)
CAPTURED_STATISTICS = Refusal(
    StatisticsError,
    "running statistics",
    "be arguments of a function that torch.func transforms while they move",
    "Hand the buffers in with torch.func.functional_call(model, (parameters, buffers), ...), call model.eval(), or let "
    "torch.func.replace_all_batch_norm_modules_(model) take them away.",
)
OTHER_ANSWERS = Refusal(
    StatisticsError,
    "a norm that {tool} takes for torch's",
    "have torch's answers",
    "Use {remedy}.",
)

Sources = int | tuple[int, ...]  # of all samples of a feature, or of each
Affine = tuple[Tensor | None, Tensor | None]

# Answers of a spec that say which state there is.
_STATE = ("population", "affine", "level_groups", "domains")

# Field under torch's name -> the answer that says who owns it.
_FIELDS = {**dict.fromkeys(AFFINE, "affine"), **dict.fromkeys(POPULATION, "population")}

# Functions of torch that read the fields of a norm and put something else into its place; the answers that would be
# lost with it; and what does the same right. Those of other people are refused where a field has several owners.
_IN_TRAINING = ("normalization_batch_size", "training", "inference", "frozen")
_TOOLS = {
    inspect.unwrap(nn.SyncBatchNorm.convert_sync_batchnorm).__code__: (
        _IN_TRAINING,
        "convert_norm(model, ...), with a spec",
    ),
    fusion.fuse_conv_bn_eval.__code__: (("inference",), "fold_norms(model)"),
}


class _Verdict(NamedTuple):
    """Running statistics that were right, and all that shows that they are the same still.

    Args:
        tensors: mean and variance themselves: a new tensor may have the address and the version of an old one.
        memory: aliases of theirs, which keep their memory from being given to others: somebody may set `.data`.
        versions: of both.
    """

    tensors: tuple[Tensor, Tensor]
    memory: tuple[Tensor, Tensor]
    versions: tuple[int, int]

    @classmethod
    def of(cls, mean: Tensor, var: Tensor) -> _Verdict:
        return cls((mean, var), (mean.detach(), var.detach()), (mean._version, var._version))

    def is_of(self, mean: Tensor, var: Tensor) -> bool:
        """Whether it is of these tensors, whatever was written to them since."""
        for now, then, memory in zip((mean, var), self.tensors, self.memory, strict=True):
            if now is not then or now.untyped_storage()._cdata != memory.untyped_storage()._cdata:
                return False
        return True


class DomainState(KeptBatchNorm2d):
    """State of a level, a domain or a pair of a norm: its affine, running statistics, or both. It is never called.

    A BatchNorm2d by type, so that optimizers exempt its affine from weight decay as every norm's.
    """

    heeds_record = True
    _is_part = False

    def __init__(
        self, num_features: int, eps: float, momentum: float | None, affine: bool, population: bool, **place: Any
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, population, **place)
        self._is_part = not (affine and population)

    def __getattr__(self, name: str) -> Any:
        """A field that the norm, or nobody, owns: whoever fills the fields of every BatchNorm2d fills nothing here."""
        value = super().__getattr__(name)
        if value is not None or not self._is_part or name not in _FIELDS or torch.compiler.is_compiling():
            return value
        if self._owns(name):
            return None
        like = next(tensor for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None)
        return OwnedField("a level or domain of a norm", name, {}, like)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_part or name not in _FIELDS or self._owns(name):
            super().__setattr__(name, value)

    def _owns(self, name: str) -> bool:
        return self.affine == (_FIELDS[name] == "affine")

    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("DomainState must not be called; it holds one domain's part of a batch norm.")


class OwnedBatchNorm2d(KeptBatchNorm2d):
    """State of a batch norm by its spec; see `BatchNorm2d`.

    Attributes:
        levels: names of the levels that it sees; (): it sees one feature map.
        sources: names of all that it tells apart: levels, domains, or pairs as "night_p3", domain after domain; one
            without a name where there are neither.
    """

    heeds_record = True  # what a call knows besides its tensors: see `bnext.scope.record`
    _spec: NormSpec = None  # type: ignore[assignment]  # until it is built

    def __init__(
        self,
        num_features: int,
        spec: NormSpec,
        levels: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=spec.eps,
            momentum=None if spec.average == "cumulative" else spec.momentum,
            affine=spec.affine == "shared",
            track_running_stats=spec.population == "shared",
            device=device,
            dtype=dtype,
        )
        self.spec = spec
        self.r_max, self.d_max = spec.r_max, spec.d_max
        self.path = ""

        self.levels = tuple(levels)
        self._check_level_groups(spec.level_groups)
        self._name_sources()
        self._check_names(spec.domains)
        self._add_states({"device": device, "dtype": dtype})
        self._keep_statistics(is_in_use=False)

        self.affine = spec.affine != "none"
        if spec.has_frozen_affine:
            self.requires_grad_(False)
        resolve_group(spec.workers)  # makes it, and refuses a number that does not fit, while the model is built

    def _check_level_groups(self, groups: Sequence[Sequence[str]]) -> None:
        owners = name_groups(groups)
        for level in owners:
            if level not in self.levels:
                raise UNKNOWN_LEVEL_OF_GROUP.of(repr(level), type(self).__name__, levels=self.levels)
        for level in self.levels:
            if level in owners.values() and level not in owners:
                raise NO_NAME.of(f"{self.levels} and a group of that name", f"{type(self).__name__}, {level!r}")

    def _check_names(self, domains: Sequence[str], known: Collection[str] = ()) -> None:
        """The state of a source lies under its name, beside torch's fields; `known` names may be there already."""
        names = [*self.levels, *domains]
        if self.levels and domains and all(isinstance(name, str) for name in names):
            names += [source.name for source in list_sources(self.levels, domains)]

        for name in names:
            is_name = isinstance(name, str) and name and "." not in name
            is_taken = hasattr(type(self), name) or hasattr(self, name) if is_name else True
            if (is_taken and name not in known) or names.count(name) > 1:
                kinds = ", ".join(repr(kind) for kind in (self.levels, tuple(domains)) if kind)
                raise NO_NAME.of(kinds, f"{type(self).__name__}, {name!r}")

    def _name_sources(self) -> None:
        domains = self._spec.domains
        groups = self._spec.level_groups
        unseen = map_owners(self.levels, (UNSEEN,), groups) if domains else {}
        owners = map_owners(self.levels, domains, groups)
        self.sources = tuple(owners["shared"])
        self.unseen_sources = tuple(unseen.get("shared", ()))
        # answer that tells something apart -> source -> owner
        self._owners: dict[str, dict[str, str]] = {}
        for answer, of_sources in owners.items():
            if is_owned(answer):
                self._owners[answer] = {**of_sources, **unseen.get(answer, {})}
        self._checked: dict[str, _Verdict] = {}  # by owner

    def _add_states(self, place: dict[str, Any]) -> None:
        affines, populations = (self._list_owners(answer) for answer in (self.spec.affine, self.spec.population))
        for name in dict.fromkeys([*affines, *populations]):
            has_affine, has_population = name in affines, name in populations
            state = DomainState(self.num_features, self.eps, self.momentum, has_affine, has_population, **place)
            self.add_module(name, state)

    def _list_owners(self, answer: str) -> list[str]:
        """Names of what owns something by an answer; none where all share it."""
        return list(dict.fromkeys(self._owners[answer][name] for name in self.sources)) if is_owned(answer) else []

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return self._spec.domains

    @property
    def spec(self) -> NormSpec:
        """The answers in force; during a training others may be set, but for those that say who owns what."""
        return cast(NormSpec, get_record().specs.get(self, self._spec))

    @spec.setter
    def spec(self, spec: NormSpec) -> None:
        is_built = self._spec is not None
        for name in _STATE if is_built else ():
            if getattr(spec, name) != getattr(self._spec, name):
                raise OTHER_STATE.of(repr(getattr(spec, name)), self.where, name=name, built=getattr(self._spec, name))
        self._spec = spec
        if is_built:
            self._keep_statistics(is_in_use=True)

    def _keep_statistics(self, is_in_use: bool) -> None:
        for holder in (self, *self._list_states()):
            holder.keep_statistics(self._spec.has_frozen_statistics, is_in_use)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_statistics(is_in_use=True)  # as files of before do not say

    @property
    def where(self) -> str:
        """Name of the layer in messages."""
        return self.path or type(self).__name__

    def name_place(self, name: str) -> str:
        """The layer and one of its sources, in messages."""
        return f"{self.where}, {name}" if name else self.where

    def extra_repr(self) -> str:
        default = NormSpec()
        answers = {name: value for name, value in vars(self.spec).items() if value != getattr(default, name)}
        return ", ".join([str(self.num_features), *(f"{name}={value!r}" for name, value in answers.items())])

    # ---- state

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have other tensors."""
        return {**vars(self), "_checked": {}}

    def __getattr__(self, name: str) -> Any:
        """A field that levels or domains own: see `OwnedField`; whoever takes the norm for torch's gets no None."""
        value = super().__getattr__(name)
        is_read_by_tools = name in ("bias", "running_mean")
        if not is_read_by_tools and (value is not None or name not in _FIELDS):
            return value
        if torch.compiler.is_compiling():
            return value

        if is_read_by_tools:
            tool = sys._getframe(1).f_code
            if tool in _TOOLS:
                self._check_tool(tool.co_name, *_TOOLS[tool])
        return self._find_owned(name) if value is None else value

    def _check_tool(self, tool: str, answers: Sequence[str], remedy: str) -> None:
        got = [
            f"{key}={getattr(self._spec, key)!r}"
            for key in answers
            if getattr(self._spec, key) != getattr(NormSpec, key)
        ]
        if self.sources != ("",):
            got.append(f"levels or domains {self.sources}")
        if got:
            raise OTHER_ANSWERS.of(", ".join(got), self.where, tool=tool, remedy=remedy)

    def _find_owned(self, name: str) -> OwnedField | None:
        owners = [] if self._spec is None else self._list_owners(getattr(self._spec, _FIELDS[name]))
        tensors: dict[str, Any] = {owner: getattr(self._modules.get(owner), name, None) for owner in owners}
        if not tensors or any(tensor is None for tensor in tensors.values()):  # being built, or they were taken away
            return None
        return OwnedField(self.where, name, tensors, like=tensors[owners[0]])

    def __setattr__(self, name: str, value: Any) -> None:
        """A field that levels or domains own is set for all of them."""
        if not self._is_owned(name):
            super().__setattr__(name, value)
            return

        for state in self._list_states() if not isinstance(value, OwnedField) else ():
            one = value.detach().clone() if isinstance(value, Tensor) else value
            setattr(state, name, nn.Parameter(one, value.requires_grad) if isinstance(value, nn.Parameter) else one)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """A field that levels or domains own is set for all of them, as by an assignment."""
        if isinstance(tensor, Tensor) and self._is_owned(name):
            setattr(self, name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)

    def _is_owned(self, name: str) -> bool:
        """Whether a field of the norm is one that its levels or domains own."""
        if name not in _FIELDS or self._spec is None or name not in {**self._parameters, **self._buffers}:
            return False
        return is_owned(getattr(self._spec, _FIELDS[name]))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for state in self._list_states():
            state.reset_running_stats()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for state in self._list_states():
            state.reset_parameters()

    @property
    def has_population(self) -> bool:
        """Whether running statistics are kept, and nobody took all of them away, as test-time adaptation does.

        Without them mini-batches normalize in every mode, as in torch's norm.
        """
        return any(state.running_mean is not None for _, state in self.populations())

    def _list_states(self) -> list[DomainState]:
        return [module for module in self.children() if isinstance(module, DomainState)]

    def population_state(self, source: str = "") -> nn.BatchNorm2d:
        """The module whose running statistics normalize a level, domain or pair: the layer, or what owns them."""
        owner = self.find_owner(self._spec.population, source)
        return self._modules[owner] if owner else self  # type: ignore[return-value]

    def affine_state(self, source: str = "") -> nn.BatchNorm2d:
        """The module whose weight and bias scale and shift a level, domain or pair."""
        owner = self.find_owner(self._spec.affine, source)
        return self._modules[owner] if owner else self  # type: ignore[return-value]

    def find_owner(self, answer: str, source: str) -> str:
        """Name of what owns the state of a source, "" where all share it; an owner's name is its own."""
        owners = self._owners.get(answer)
        return owners.get(source, source) if owners else ""

    def populations(self) -> Iterator[tuple[tuple[str, ...], nn.BatchNorm2d]]:
        """Each set of population statistics, with the names of what it normalizes."""
        for owner in self._list_owners(self._spec.population):
            yield (owner,), self.population_state(owner)
        if self._spec.population == "shared":
            yield tuple(filter(None, self.sources)), self

    @property
    def has_bias(self) -> bool:
        """Whether its affine, if it has one, is scale and shift; one that was converted may be a scale alone."""
        holders = [self, *self._list_states()]
        return all(holder.weight is None or holder.bias is not None for holder in holders)

    def stack_affines(self, names: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias for each name, [P, C]; `like` gives type and device where there is none."""
        size = (len(names), self.num_features)
        if self._spec.affine == "none":
            return like.new_ones(size), like.new_zeros(size)

        has_bias = self.has_bias
        if self._spec.affine == "shared":
            return self.weight.expand(size), self.bias.expand(size) if has_bias else like.new_zeros(size)

        weight = torch.stack([self._mix_affines(name, "weight") for name in names])
        bias = torch.stack([self._mix_affines(name, "bias") for name in names]) if has_bias else like.new_zeros(size)
        return weight, bias

    def _mix_affines(self, name: str, field: str) -> Tensor:
        """Weight or bias of a level or domain, [C]; of what stands for several the mean of theirs."""
        tensors: list[Tensor] = [getattr(self.affine_state(source), field) for source in self.list_members(name)]
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)

    def list_affines(self, names: Sequence[str], used: Sequence[int]) -> list[Affine]:
        """Weight and bias for each name, of which `used` are needed.

        Those that are not needed get a gradient of zero, as elsewhere: DistributedDataParallel waits for them.
        """
        if not is_owned(self._spec.affine):
            return [(self.weight, self.bias)] * len(names)

        members = [self.list_members(name) for name in names]
        states = [self.affine_state(of_name[0]) for of_name in members]
        owners = [frozenset(self.find_owner(self._spec.affine, member) for member in of_name) for of_name in members]
        is_mixed = any(len(of_name) > 1 for of_name in owners)
        is_all_used = {owners[index] for index in used} == set(owners)
        if not is_mixed and (is_all_used or not torch.is_grad_enabled()):
            return [(state.weight, state.bias) for state in states]

        weight, bias = self.stack_affines(names, states[0].weight)
        return list(zip(weight.unbind(), bias.unbind(), strict=True))

    def stack_populations(self, names: Sequence[str]) -> Moments:
        """Running statistics for each name, [P, C]; a copy, as they may move before the backward pass.

        Their count is infinity: to the gradient they are constants.
        """
        pairs = [self.mix_populations(name) for name in names]
        mean, var = (torch.stack(fields) for fields in zip(*pairs, strict=True))
        return Moments(mean.new_full((len(names),), float("inf")), mean, var)

    def mix_populations(self, name: str) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a level or domain, [C]; of what stands for several those of their mixture."""
        if not is_unseen(name):
            state: Any = self.population_state(name)
            return state.running_mean, state.running_var

        states: list[Any] = list(dict.fromkeys(map(self.population_state, self.list_members(name))))
        if len(states) == 1:
            return states[0].running_mean, states[0].running_var

        mean = torch.stack([state.running_mean for state in states])
        var = torch.stack([state.running_var for state in states])
        _, mean, var = merge_moments(Moments(mean.new_ones(len(states)), mean, var))
        return mean, var

    def list_members(self, name: str) -> Sequence[str]:
        """The sources that a name stands for: itself, or, of unseen domains, those of all domains at its level."""
        if not is_unseen(name):
            return (name,)
        return self.sources[self.unseen_sources.index(name) :: len(self.unseen_sources)]

    # ---- other domains than it was built with

    def find_owners(self, domain: str) -> list[str]:
        """Names of what a domain owns, by itself or at each level, in an order that is the same for all domains."""
        answers = [answer for answer in (self._spec.affine, self._spec.population) if is_per_domain(answer)]
        owners: list[str] = []
        for answer in answers:
            sources = list_sources(self.levels, [domain])
            owners += [source.find_owner(answer, self._spec.level_groups) for source in sources]
        return list(dict.fromkeys(owners))

    def domain_states(self, domain: str) -> list[DomainState]:
        """The modules that hold what a domain owns, in the order of `find_owners`."""
        return [cast(DomainState, self._modules[name]) for name in self.find_owners(domain)]

    def check_domains(self, domains: Sequence[str]) -> None:
        """Refuse names that domains cannot have; those of now can."""
        self._check_names(domains, {*self.levels, *self.domains, *self.sources})

    def set_domains(self, sources: Mapping[str, str], fallback_domain: str | None) -> None:
        """Have other domains, each with the state that one has now. In place.

        Args:
            sources: name -> domain of now. What it owns stays the same tensors if it keeps its name, else it is a copy.
            fallback_domain: see `NormSpec`.

        Raises:
            ConfigError: a name that a module cannot have.
        """
        self.check_domains(list(sources))
        rule = {"fallback_domain": fallback_domain, "unseen": self._spec.unseen}
        spec = self._spec.replace(domains=tuple(sources), **rule)
        before = {domain: self.domain_states(domain) for domain in self.domains}

        for domain in self.domains:
            for name in self.find_owners(domain):
                del self._modules[name]
        self._spec = spec
        self._name_sources()

        for domain, source in sources.items():
            for name, state in zip(self.find_owners(domain), before[source], strict=True):
                self.add_module(name, state if domain == source else copy.deepcopy(state))

    def keep_domain(self, domain: str) -> None:
        """Be the norm of one domain alone, which needs no name: what it owns becomes the layer's, or its level's.

        In place; parameters and buffers stay the same tensors.
        """
        before: list[tuple[str, Any, Any]] = []
        for level in self.levels or ("",):
            name = Source(level, domain).name
            before.append((level, self.affine_state(name), self.population_state(name)))
        for state_name in [name for name, module in self._modules.items() if isinstance(module, DomainState)]:
            del self._modules[state_name]

        answers = {field: drop_domains(getattr(self._spec, field)) for field in OWNED}
        self._spec = self._spec.replace(**answers, domains=(), fallback_domain=None, unseen="error")
        self._name_sources()
        self._add_states({})

        for level, affine, population in before:
            self.affine_state(level)._parameters.update(affine._parameters)
            new: Any = self.population_state(level)
            new._buffers.update(population._buffers)
            new.track_running_stats = population.track_running_stats
        self.train(self.training)
        self._keep_statistics(is_in_use=True)
        self.note_statistics()

    # ---- domains of a call

    def find_domains(
        self, active: str | tuple[str, ...] | None, num_samples: int, spec: NormSpec | None = None
    ) -> Sources:
        """Index, in `domains`, of the domain of all samples, or of each sample's; 0 without domains.

        Args:
            active: as the call names it.
            num_samples: N.
            spec: in force; None: as it is now.

        Returns:
            For a domain that the norm has not, by the rule of the spec: that of the fallback domain; or, at inference,
            the number of domains, behind the last of them.

        Raises:
            DomainError: there is no rule, or the names are not one per sample.
        """
        if not self.domains:
            return 0
        spec = spec or self.spec
        if not isinstance(active, tuple):
            return self._find_domain(active, spec)

        if len(active) != num_samples:
            raise NOT_ONE_PER_SAMPLE.of(f"{len(active)} names for {num_samples} samples", self.where)
        domains = tuple(self._find_domain(name, spec) for name in active)
        return domains if len(set(domains)) > 1 else domains[0]  # of one domain it is as a batch of torch's norm

    def _find_domain(self, name: str | None, spec: NormSpec) -> int:
        if name in self.domains:
            return self.domains.index(name)
        if spec.unseen == "fallback":
            return self.domains.index(cast(str, spec.fallback_domain))
        if spec.unseen != "error" and not self.training:
            return len(self.domains)

        subject = f"Domain {name!r} is unknown" if name else "No domain is active"
        remedy = NAME_THE_DOMAIN if self.training else f"{NAME_THE_DOMAIN} {CHOOSE_A_RULE}"
        raise DomainError(f"{subject} in {self.where}, which has the domains {self.domains}. {remedy}")

    def name_sources(self, sources: Sequence[Sources]) -> tuple[str, ...]:
        """The names that indices of sources are of: `sources`, and behind them `unseen_sources`, if some are of these.

        Args:
            sources: for each feature of a call the index of all its samples, or of each.
        """
        number = len(self.sources)
        for source in sources if self.unseen_sources else ():
            if (source if isinstance(source, int) else max(source)) >= number:
                return (*self.sources, *self.unseen_sources)
        return self.sources

    def count_domains(self, call: NormCall, num_samples: int) -> None:
        """Count the samples of each domain in training, and those that were taken for the fallback domain."""
        if not self.domains or not call.moves or not is_ordinary():
            return

        active: Mapping[str | None, int]
        active = Counter(call.domain) if isinstance(call.domain, tuple) else {call.domain: num_samples}
        counts = counts_of(self)
        for name, number in active.items():
            is_known = name in self.domains
            if not is_known and call.spec.unseen != "fallback":
                continue  # an image of it is counted where its rule is applied
            taken = cast(str, name if is_known else call.spec.fallback_domain)
            if self.training:
                counts.domains[taken] += number
            if is_known or not number:
                continue

            if self.training:
                counts.fallbacks[name or None] += number
            else:
                counts.unseen[UnseenCount(name or None, "fallback", taken)] += number
            subject = f"Samples of the domain {name!r}" if name else "Samples without a domain"
            tell_once(log, (subject, taken), FALLBACK, subject, taken, self.where)

    # ---- populations that move

    def is_moving(self, name: str, call: NormCall) -> bool:
        """Whether a call moves the running statistics of a source."""
        if not (self.training and call.moves) or call.spec.has_frozen_statistics or call.spec.population == "none":
            return False
        state = self.population_state(name)
        return state.track_running_stats and state.running_mean is not None

    @torch.no_grad()
    def move_populations(
        self,
        moments: Moments,
        sources: Sequence[int],
        names: tuple[str, ...],
        call: NormCall,
        merged: tuple[tuple[int, ...], Moments] | None = None,
    ) -> None:
        """One update of a population per mini-batch, in the order of the sources; groups are merged first.

        Args:
            moments: of parts of the samples, [P].
            sources: for each part the index of its source in `names`.
            names: of the sources that may occur.
            call: what the call knows.
            merged: for each part the number of its mini-batch, and the moments of these, where they are known already.
        """
        if not any(self.is_moving(name, call) for name in names):
            return

        of_parts = [names[source] for source in sources]
        answers = (call.spec.statistics, call.spec.population)
        units = number_groups(tuple(tuple(self.find_owner(a, name) for a in answers) for name in of_parts))
        if merged is not None and merged[0] == units:
            moments = merged[1]
        elif units != tuple(range(len(units))):
            moments = group_moments(moments, make_index(units, moments.mean.device), max(units) + 1)

        of_units = [of_parts[units.index(unit)] for unit in range(max(units) + 1)]
        for turn in self._take_turns(of_units, call):
            rows = moments
            if len(turn) < len(of_units):
                index = make_index(tuple(turn), moments.mean.device)
                rows = Moments(*(field[index] for field in moments))
            self._move([of_units[unit] for unit in turn], rows)

    def _take_turns(self, names: Sequence[str], call: NormCall) -> list[list[int]]:
        """Numbers of the sources whose populations move: all at once, but one after the other where they share one."""
        turns: list[list[int]] = []
        moved: Counter[str] = Counter()
        for number, name in enumerate(names):
            if not self.is_moving(name, call):
                continue

            owner = self.find_owner(call.spec.population, name)
            if moved[owner] == len(turns):
                turns.append([])
            turns[moved[owner]].append(number)
            moved[owner] += 1
        return turns

    def _move(self, names: Sequence[str], moments: Moments) -> None:
        """Let the population of each source take in the moments of a mini-batch, [S]."""
        states: list[Any] = [self.population_state(name) for name in names]
        old_mean = _stack_fields(states, "running_mean")
        old_var = _stack_fields(states, "running_var")

        momentum: float | Tensor | None = self.momentum
        if momentum is None:
            tracked = _stack_fields(states, "num_batches_tracked")
            momentum = 1 / (tracked + 1).to(moments.mean.dtype)
        mean, var = update_running_statistics(old_mean, old_var, moments, momentum)
        is_finite = find_finite((mean, var))
        is_counted = is_finite & (moments.count >= 2)

        for state, *values in zip(states, mean, var, is_finite, is_counted, strict=True):
            self._write_statistics(state, *values)

    @torch.no_grad()
    def replace_statistics(self, state: Any, mean: Tensor, var: Tensor) -> None:
        """New running statistics take the place of the old, unless an overflow spoils them: then the old ones stay.

        Args:
            state: whose they are, a `population_state`.
            mean, var: [C].
        """
        is_finite = find_finite((mean, var))
        self._write_statistics(state, mean, var, is_finite, is_finite)

    def _write_statistics(self, state: Any, mean: Tensor, var: Tensor, is_finite: Tensor, is_counted: Tensor) -> None:
        self.check_can_move(state.running_mean, mean)

        # Through .data, as torch's kernel does: another call's graph may hold the buffers, and not need them.
        has_data = not (is_transformed() or is_exported())  # which lose it, or refuse it
        for buffer, value in ((state.running_mean, mean), (state.running_var, var)):
            if has_data and not is_traced():
                torch.where(is_finite, value, buffer, out=buffer.data)
            else:
                (buffer.data if has_data else buffer).copy_(torch.where(is_finite, value, buffer))

        if state.num_batches_tracked is not None:
            state.num_batches_tracked.add_(is_counted)
        counts_of(state).count_mini_batch(is_finite)

    def check_can_move(self, buffer: Tensor, by: Tensor) -> None:
        """A transform of torch.func lets nobody write to tensors from outside of it."""
        if not is_traced() and is_wrapped(by) and not is_wrapped(buffer):
            raise CAPTURED_STATISTICS.of("those of the norm itself", self.where)

    # ---- checks

    def check_kept_statistics(self, names: Sequence[str]) -> None:
        """Frozen statistics are those of the freeze, see `KeptBatchNorm2d.check_kept`."""
        for name in dict.fromkeys(names) if self._spec.has_frozen_statistics else ():
            state: Any = self.population_state(name)
            state.check_kept(self.name_place(name))

    def train(self, mode: bool = True) -> Self:
        self._checked = {}
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        local_metadata, _, missing_keys, _, error_msgs = args
        self._checked = {}
        refuse_folded_state(self.where, prefix, local_metadata, error_msgs)

        form = form_of_spec(self._spec, self.num_features, self.levels, self.eps, self.has_bias)
        convert_in_place(cast(dict[str, Tensor], state_dict), prefix, form, missing_keys, error_msgs)
        super()._load_from_state_dict(cast(dict[str, Tensor], state_dict), prefix, *args)

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
            for tensor in (module._parameters.get("weight"), module._buffers.get("running_mean")):
                if tensor is not None:
                    return tensor
        return None

    def check_populations(self, names: Sequence[str]) -> None:
        """Finite, and no negative variance.

        It waits for the device, so it is done once after a change of mode, a load, for other tensors than those that
        were looked at, and, at inference, after somebody's write. Of statistics without numbers nothing is asked.
        """
        if is_traced():
            return

        owners = {self.find_owner(self._spec.population, name): name for name in names}
        for owner, name in owners.items():
            state: Any = self.population_state(owner)
            mean, var = state.running_mean, state.running_var
            if mean is None or var is None:
                raise NO_STATISTICS.of("None", self.name_place(name))
            if not (has_numbers(mean) and has_numbers(var)) or self._is_checked(owner, mean, var):
                continue

            check_statistics(mean, var, self.name_place(name), "; look for the batch that spoiled them")
            if not (is_under_mode() or mean.is_inference() or var.is_inference()):  # those of inference have no version
                self._checked[owner] = _Verdict.of(mean, var)

    def _is_checked(self, owner: str, mean: Tensor, var: Tensor) -> bool:
        """In training a write does not count: DistributedDataParallel may broadcast buffers in each step."""
        verdict = self._checked.get(owner)
        if verdict is None or not verdict.is_of(mean, var):
            return False
        return self.training or verdict.versions == (mean._version, var._version)


def _stack_fields(states: Sequence[Any], name: str) -> Tensor:
    """A field of each state, [S, ...]; of one alone it is no copy."""
    fields: list[Tensor] = [getattr(state, name) for state in states]
    return fields[0].unsqueeze(0) if len(fields) == 1 else torch.stack(fields)


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

"""The layout of one norm's state: who owns its affine and its population statistics, under which keys.

Which modules have which form is in `bnext.layers.forms`; how state goes from one to another is in
`bnext.layers.norm_state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bnext.layers.sources import Ownership, Source, is_per_domain, is_per_level, list_sources
from bnext.layers.spec import NormSpec

__all__ = ["AFFINE", "POPULATION", "NormForm", "form_of_spec"]

AFFINE = ("weight", "bias")
POPULATION = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True)
class NormForm:
    """The layout of one norm's state.

    Args:
        num_features: channels C.
        affine, population: who owns it, as `NormSpec` says; what is "shared" lies on the norm itself.
        has_counter: num_batches_tracked is kept.
        eps: added to the variance.
        levels, domains: their names.
        level_groups: levels that go together where something is per level.
        inference: what normalizes in evaluation mode; norms for which this is equal, and affine,
            population and eps as well, have equal outputs.
        is_frozen: population statistics normalize in training too.
        has_bias: an affine is scale and shift; False: scale alone.
    """

    num_features: int
    affine: Ownership
    population: Ownership
    eps: float
    levels: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    level_groups: tuple[tuple[str, ...], ...] = ()
    has_counter: bool = True
    inference: tuple[object, ...] = ("population",)
    is_frozen: bool = False
    has_bias: bool = True

    @property
    def is_batch_norm(self) -> bool:
        """Whether it normalizes by a batch or by the population, and not each sample alone."""
        return self.inference[0] in ("population", "mini_batch")

    @property
    def is_numbered(self) -> bool:
        """Whether levels, or domains, have numbers for names, whose meaning is their order."""
        names = self.levels or self.domains
        return bool(names) and names == tuple(str(index) for index in range(len(names)))

    @property
    def owners(self) -> tuple[str, ...]:
        """Names of what owns something: levels, domains, or pairs."""
        owners = [*self.group_sources(self.affine), *self.group_sources(self.population)]
        return tuple(filter(None, dict.fromkeys(owners)))

    @property
    def names(self) -> tuple[str, ...]:
        """All names of levels, domains, and pairs, whatever they own."""
        pairs = [source.name for source in list_sources(self.levels, self.domains)]
        return tuple(filter(None, dict.fromkeys([*self.levels, *self.domains, *pairs])))

    def group_sources(self, answer: Ownership) -> dict[str, list[Source]]:
        """Owner of something, by an answer -> the sources that it owns it for; "" is the norm itself."""
        groups: dict[str, list[Source]] = {}
        for source in list_sources(self.levels, self.domains) if answer != "none" else ():
            groups.setdefault(source.find_owner(answer, self.level_groups), []).append(source)
        return groups

    def list_keys(self) -> list[str]:
        """The keys of its state dict."""
        affine = AFFINE if self.has_bias else AFFINE[:1]
        population = POPULATION if self.has_counter else POPULATION[:2]
        keys = []

        for answer, fields in ((self.affine, affine), (self.population, population)):
            for owner in self.group_sources(answer):
                keys += [f"{owner}.{field}" if owner else field for field in fields]

        return keys


def form_of_spec(
    spec: NormSpec, num_features: int, levels: Sequence[str], eps: float, has_bias: bool = True
) -> NormForm:
    """The form of a norm of bnext.

    Args:
        spec: its answers.
        num_features: its channels C.
        levels: names of its levels; (): it sees one feature map.
        eps: added to its variance.
        has_bias: see `NormForm`.
    """
    inference: tuple[object, ...] = ("population",)
    if spec.inference == "mini_batch":
        inference = ("mini_batch", spec.statistics)
        inference += (tuple(levels), spec.level_groups) if is_per_level(spec.statistics) else ()
        inference += (spec.domains,) if is_per_domain(spec.statistics) else ()

    return NormForm(
        num_features=num_features,
        affine=spec.affine,
        population=spec.population,
        eps=eps,
        levels=tuple(levels),
        domains=spec.domains,
        level_groups=spec.level_groups,
        inference=inference,
        is_frozen=spec.has_frozen_statistics,
        has_bias=has_bias,
    )

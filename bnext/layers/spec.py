"""`NormSpec`: which batch? One frozen record describes one way of doing batch normalization."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args, get_origin, get_type_hints

from bnext.errors import ConfigError, check_choice
from bnext.layers.sources import Ownership, Sharing, is_per_domain, is_per_level

__all__ = ["OWNED", "TABLE5_ROWS", "NormSpec", "Ownership", "Sharing", "Unseen", "Workers"]

Workers = Literal["one", "node", "all"] | int
Training = Literal["mini_batch", "population", "renorm"]
Average = Literal["moving", "cumulative"]
Inference = Literal["population", "mini_batch"]
Frozen = Literal["none", "statistics", "affine", "both"]
SingleElement = Literal["error", "population"]
Unseen = Literal["error", "fallback", "mixture", "mini_batch", "blend", "stream", "nearest"]

# (mini-batch statistics, population statistics, affine); Wu and Johnson 2021, Table 5.
TABLE5_ROWS: dict[int, tuple[Sharing, Sharing, Sharing]] = {
    1: ("shared", "shared", "shared"),
    2: ("shared", "per_level", "shared"),
    3: ("per_level", "shared", "shared"),
    4: ("per_level", "per_level", "shared"),
    5: ("per_level", "shared", "per_level"),
    6: ("per_level", "per_level", "per_level"),
}
# Answers that levels and domains may have for themselves.
OWNED = ("statistics", "population", "affine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """The answers of a batch norm to the question "which batch?". The defaults are torch's BatchNorm2d.

    "Levels" are the features of one call of a `LevelBatchNorm2d`, "domains" the named sources of
    samples (see `bnext.use_domain`). Statistics, population and affine are each "shared", "per_level",
    "per_domain", or "per_level_and_domain", in any combination.

    Args:
        statistics: over which features the mini-batch statistics of SGD are computed: everything
            in a call together ("shared"), each level, each domain, or each domain at each level alone.
        normalization_batch_size: at most so many samples of this worker are normalized together
            (Ghost BN); None: all of them. A batch is cut into as few groups as that allows, whose
            sizes differ by at most one. It has no effect at inference.
        workers: who shares a mini-batch: this worker alone ("one", as BN), the workers of a machine
            ("node"), `k` consecutive workers (a number that divides all), or all ("all", as SyncBN).
            Statistics at inference are always this worker's.
        training: what normalizes in training: the mini-batch; the population statistics, which
            still follow the mini-batches; or, "renorm", the mini-batch corrected towards the
            population (Batch Renormalization).
        r_max, d_max: limits of renorm's corrections: 1/r_max <= r <= r_max, |d| <= d_max.
        population: which population statistics are remembered: one set, one per level, domain or both, or none.
        average: how they take in a mini-batch: by an exponential moving average with `momentum`, or
            by the mean of all so far ("cumulative").
        momentum: weight of the new value in the moving average, torch's sense; above 0, at most 1.
        inference: what normalizes in evaluation mode: population statistics, or the mini-batch.
        affine: who owns scale and shift: everything together, each level, domain or both, or nobody.
        frozen: what no longer changes: "statistics" (population statistics normalize in training and
            are not updated), "affine" (scale and shift have no gradient), or both, as FrozenBN.
        single_element: a mini-batch with a single element per channel has no variance. In training it
            is an error that names the layer, or is normalized by the population statistics. (At
            inference always the latter.)
        level_groups: levels that go together where something is per level: (("p3", "p4"), ("p5", "p6", "p7")) is
            between "shared" and "per_level". The state of a group lies under its name, "p3-p4"; a level in no group is
            alone.
        domains: names of the domains, if an answer is "per_domain" or "per_level_and_domain".
        unseen: what normalizes samples of a domain that the norm has not, or of none, at inference:
            nothing, as that is an error; a named domain ("fallback"); the mixture of all domains; each
            image's mini-batch; a blend of both; the mixture as it follows the stream of such images; or
            the domain whose population is nearest to the image's statistics. See `bnext.layers.unseen`.
            None: "fallback" if there is a fallback domain, else "error". In training it is always an
            error, but for "fallback".
        fallback_domain: the one that "fallback" takes.
        source_images: in a blend and a stream the mixture counts as so many images, 0 to infinity;
            "auto": as many as fit how far the image's statistics are from it.
        eps: added to the variance; above 0.

    Raises:
        ConfigError: a value is outside its set or range, or answers contradict one another.

    Example:
        >>> NormSpec(workers="all").table5_row
        1
        >>> NormSpec.from_table5_row(6, workers="all").affine
        'per_level'

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021; Ioffe, *Batch Renormalization*, 2017;
        Hoffer, Hubara and Soudry, *Train longer, generalize better*, 2017 (Ghost BN).
    """

    statistics: Sharing = "shared"
    normalization_batch_size: int | None = None
    workers: Workers = "one"
    training: Training = "mini_batch"
    r_max: float = 3.0
    d_max: float = 5.0
    population: Ownership = "shared"
    average: Average = "moving"
    momentum: float = 0.1
    inference: Inference = "population"
    affine: Ownership = "shared"
    frozen: Frozen = "none"
    single_element: SingleElement = "error"
    level_groups: tuple[tuple[str, ...], ...] = ()
    domains: tuple[str, ...] = ()
    unseen: Unseen | None = None
    fallback_domain: str | None = None
    source_images: float | Literal["auto"] = "auto"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if isinstance(self.domains, str) or not isinstance(self.domains, Sequence):
            rule, remedy = "be a sequence of names", "Write ('day', 'night')."
            raise ConfigError.of("domains", rule, got=repr(self.domains), where="NormSpec", remedy=remedy)
        object.__setattr__(self, "domains", tuple(self.domains))  # a config gives a list
        object.__setattr__(self, "level_groups", _read_groups(self.level_groups))
        if self.unseen is None:
            object.__setattr__(self, "unseen", "error" if self.fallback_domain is None else "fallback")
        check_choice("unseen", self.unseen, get_args(Unseen))

        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))
        for rule in _RULES:
            rule.check(self)

    @classmethod
    def from_table5_row(cls, row: int, *, workers: Workers = "one") -> NormSpec:
        """The spec of one of the paper's six rows.

        Raises:
            ConfigError: `row` is not 1 to 6.
        """
        if not isinstance(row, int) or row not in TABLE5_ROWS:
            raise ConfigError.of(
                "row", "be one of 1 to 6", got=repr(row), where="Table 5", remedy="Choose one of them."
            )
        statistics, population, affine = TABLE5_ROWS[row]
        return cls(statistics=statistics, population=population, affine=affine, workers=workers)

    @property
    def table5_row(self) -> int | None:
        """The row of Table 5 that the answers are, or None where they are in none.

        Shared statistics with an affine per level are in none, nor is anything per domain, or per group of levels.
        """
        if self.level_groups:
            return None
        answers = (self.statistics, self.population, self.affine)
        return next((row for row, cells in TABLE5_ROWS.items() if cells == answers), None)

    @property
    def has_levels(self) -> bool:
        """Whether levels have something for themselves."""
        return any(is_per_level(getattr(self, name)) for name in OWNED)

    @property
    def has_domains(self) -> bool:
        """Whether domains have something for themselves."""
        return any(is_per_domain(getattr(self, name)) for name in OWNED)

    @property
    def has_frozen_statistics(self) -> bool:
        return self.frozen in ("statistics", "both")

    @property
    def has_frozen_affine(self) -> bool:
        return self.frozen in ("affine", "both")

    def replace(self, **changes: object) -> NormSpec:
        """A copy with some answers changed. A fallback domain is taken, unless another rule is set with it."""
        if changes.get("fallback_domain") is not None:
            changes.setdefault("unseen", "fallback")
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _read_groups(groups: object) -> tuple[tuple[str, ...], ...]:
    """Groups of levels as tuples, of whatever sequences they are."""
    is_right = isinstance(groups, Sequence) and not isinstance(groups, str)
    for group in groups if is_right else ():  # type: ignore[attr-defined]
        is_right &= isinstance(group, Sequence) and not isinstance(group, str) and len(group) > 0

    if not is_right:
        rule, remedy = "be a sequence of groups of names", "Write (('p3', 'p4'), ('p5', 'p6', 'p7'))."
        raise ConfigError.of("level_groups", rule, got=repr(groups), where="NormSpec", remedy=remedy)
    return tuple(tuple(group) for group in groups)  # type: ignore[attr-defined]


def _are_groups(groups: Sequence[Sequence[str]]) -> bool:
    """Whether every level is in one group, and a name that can be joined to that of the group."""
    levels = list(itertools.chain.from_iterable(groups))
    are_names = all(isinstance(level, str) and level and "-" not in level for level in levels)
    return are_names and len(set(levels)) == len(levels)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A rule that the answers of a spec must keep to, each alone or together.

    Args:
        name: of the field that the error names.
        holds: whether a spec keeps to it.
        rule, remedy: of the message, see `BNextError.of`.
        beside: another field whose value the message tells.
    """

    name: str
    holds: Callable[[NormSpec], bool]
    rule: str
    remedy: str
    beside: str = ""

    def check(self, spec: NormSpec) -> None:
        if self.holds(spec):
            return
        got = repr(getattr(spec, self.name))
        if self.beside:
            got += f" with {self.beside}={getattr(spec, self.beside)!r}"
        raise ConfigError.of(self.name, self.rule, got=got, where="NormSpec", remedy=self.remedy)


_NO_POPULATION = "where no population statistics are kept"
_BY_MINI_BATCH = "Set training='mini_batch', or population='shared'."
_KEEP = "Set population='shared', or leave it at its default."

_RULES = (
    # Each alone.
    _Rule(
        "momentum",
        lambda spec: _is_number(spec.momentum) and 0 < spec.momentum <= 1,
        "be a number above 0 and at most 1",
        "Use 0.1, without quotes; for torch's momentum=None use average='cumulative'.",
    ),
    _Rule(
        "eps",
        lambda spec: _is_number(spec.eps) and 0 < spec.eps < float("inf"),
        "be a number above 0",
        "Use 1e-5, without quotes.",
    ),
    _Rule(
        "r_max",
        lambda spec: _is_number(spec.r_max) and spec.r_max >= 1,
        "be a number of 1 or more",
        "Use 3, or 1 for no correction.",
    ),
    _Rule(
        "d_max",
        lambda spec: _is_number(spec.d_max) and spec.d_max >= 0,
        "be a number of 0 or more",
        "Use 5, or 0 for no correction.",
    ),
    _Rule(
        "workers",
        lambda spec: spec.workers in ("one", "node", "all") or _is_count(spec.workers),
        "be one of 'one', 'node', 'all', or a number of workers from 1 on",
        "Choose one of them.",
    ),
    _Rule(
        "normalization_batch_size",
        lambda spec: spec.normalization_batch_size is None or _is_count(spec.normalization_batch_size),
        "be 1 or more, or None for the whole batch",
        "Choose how many samples are normalized together.",
    ),
    _Rule(
        "domains",
        lambda spec: (
            all(isinstance(name, str) and name for name in spec.domains) and len(set(spec.domains)) == len(spec.domains)
        ),
        "be distinct names",
        "Name each once, as ('day', 'night').",
    ),
    # Levels.
    _Rule(
        "level_groups",
        lambda spec: _are_groups(spec.level_groups),
        "name each level once, by a name without '-'",
        "Write (('p3', 'p4'), ('p5', 'p6', 'p7')).",
    ),
    _Rule(
        "level_groups",
        lambda spec: not spec.level_groups or spec.has_levels,
        "be empty where nothing is per_level or per_level_and_domain",
        "Set statistics, population or affine so, or leave the groups out.",
    ),
    # Domains.
    _Rule(
        "domains",
        lambda spec: bool(spec.domains) or not spec.has_domains,
        "name the domains where something is per_domain or per_level_and_domain",
        "Name them: domains=('day', 'night'), in a config MODEL.BNEXT.DOMAINS.NAMES.",
    ),
    _Rule(
        "domains",
        lambda spec: not spec.domains or spec.has_domains,
        "be empty where nothing is per_domain or per_level_and_domain",
        "Set statistics, population or affine so, or leave the domains out.",
    ),
    _Rule(
        "fallback_domain",
        lambda spec: spec.fallback_domain is None or spec.fallback_domain in spec.domains,
        "be one of the domains",
        "Name one of them.",
        beside="domains",
    ),
    _Rule(
        "unseen",
        lambda spec: spec.unseen != "fallback" or spec.fallback_domain is not None,
        "have a fallback_domain where it is 'fallback'",
        "Name one of the domains, or choose another rule.",
    ),
    _Rule(
        "unseen",
        lambda spec: spec.unseen == "error" or bool(spec.domains),
        "be 'error' where nothing is per_domain",
        "Set statistics, population or affine to 'per_domain', or leave it out.",
    ),
    _Rule(
        "source_images",
        lambda spec: spec.source_images == "auto" or (_is_number(spec.source_images) and spec.source_images >= 0),
        "be a number of 0 or more, or 'auto'",
        "Use 16; 0 takes each image's own statistics alone, float('inf') the mixture.",
    ),
    # Answers that exclude one another, and those that would be without effect.
    _Rule(
        "training",
        lambda spec: spec.population != "none" or spec.training == "mini_batch",
        f"be 'mini_batch' {_NO_POPULATION}",
        _BY_MINI_BATCH,
        beside="population",
    ),
    _Rule(
        "inference",
        lambda spec: spec.population != "none" or spec.inference == "mini_batch",
        f"be 'mini_batch' {_NO_POPULATION}",
        "Set inference='mini_batch', or population='shared'.",
        beside="population",
    ),
    _Rule(
        "frozen",
        lambda spec: spec.population != "none" or not spec.has_frozen_statistics,
        f"not ask for population statistics {_NO_POPULATION}",
        _KEEP,
        beside="population",
    ),
    _Rule(
        "single_element",
        lambda spec: spec.population != "none" or spec.single_element != "population",
        f"not ask for population statistics {_NO_POPULATION}",
        _KEEP,
        beside="population",
    ),
    _Rule(
        "frozen",
        lambda spec: spec.affine != "none" or not spec.has_frozen_affine,
        "be 'none' or 'statistics' where there is no affine",
        "Set one of them.",
        beside="affine",
    ),
    _Rule(
        "normalization_batch_size",
        lambda spec: spec.normalization_batch_size is None or spec.workers in ("one", 1),
        "be None where several workers share a mini-batch",
        "Set workers='one' to cut the batch of each worker into groups, or workers=k to join the batches of k workers.",
        beside="workers",
    ),
    _Rule(
        "normalization_batch_size",
        lambda spec: spec.normalization_batch_size is None or spec.training != "population",
        "be None where population statistics normalize in training",
        "Set training='mini_batch'.",
        beside="training",
    ),
)

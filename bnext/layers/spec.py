"""`NormSpec`: which batch? One frozen record describes one way of doing batch normalization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args, get_type_hints

from bnext.errors import ConfigError, check_choice

__all__ = ["TABLE5_ROWS", "NormSpec", "Sharing", "Workers"]

Sharing = Literal["shared", "per_level", "per_domain"]
Ownership = Literal["shared", "per_level", "per_domain", "none"]
Workers = Literal["one", "node", "all"] | int
Training = Literal["mini_batch", "population", "renorm"]
Average = Literal["moving", "cumulative"]
Inference = Literal["population", "mini_batch"]
Frozen = Literal["none", "statistics", "affine", "both"]
SingleElement = Literal["error", "population"]

# (mini-batch statistics, population statistics, affine); Wu and Johnson 2021, Table 5.
TABLE5_ROWS: dict[int, tuple[Sharing, Sharing, Sharing]] = {
    1: ("shared", "shared", "shared"),
    2: ("shared", "per_level", "shared"),
    3: ("per_level", "shared", "shared"),
    4: ("per_level", "per_level", "shared"),
    5: ("per_level", "shared", "per_level"),
    6: ("per_level", "per_level", "per_level"),
}
_OWNED = ("statistics", "population", "affine")
_CHOICES = (*_OWNED, "training", "average", "inference", "frozen", "single_element")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """The answers of a batch norm to the question "which batch?". The defaults are torch's BatchNorm2d.

    "Levels" are the features of one call of a `LevelBatchNorm2d`, "domains" the named sources of
    samples (see `bnext.use_domain`); a spec speaks of one of the two.

    Args:
        statistics: over which features the mini-batch statistics of SGD are computed: everything
            in a call together ("shared"), or each level or each domain alone.
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
        population: which population statistics are remembered: one set, one per level or domain, or none.
        average: how they take in a mini-batch: by an exponential moving average with `momentum`, or
            by the mean of all so far ("cumulative").
        momentum: weight of the new value in the moving average, torch's sense; above 0, at most 1.
        inference: what normalizes in evaluation mode: population statistics, or the mini-batch.
        affine: who owns scale and shift: everything together, each level or domain, or nobody.
        frozen: what no longer changes: "statistics" (population statistics normalize in training and
            are not updated), "affine" (scale and shift have no gradient), or both, as FrozenBN.
        single_element: a mini-batch with a single element per channel has no variance. In training it
            is an error that names the layer, or is normalized by the population statistics. (At
            inference always the latter.)
        domains: names of the domains, if an answer is "per_domain".
        fallback_domain: taken where no domain is active, or an unknown one; None: that is an error.
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
    domains: tuple[str, ...] = ()
    fallback_domain: str | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if isinstance(self.domains, str) or not isinstance(self.domains, Sequence):
            raise ConfigError(
                f"domains must be a sequence of names; got {self.domains!r} (NormSpec). Write ('day', 'night')."
            )
        object.__setattr__(self, "domains", tuple(self.domains))  # a config gives a list
        _check_types(self)
        hints = get_type_hints(type(self))
        for name in _CHOICES:
            check_choice(name, getattr(self, name), get_args(hints[name]))
        _check_ranges(self)
        _check_domains(self)
        _check_contradictions(self)

    @classmethod
    def from_table5_row(cls, row: int, *, workers: Workers = "one") -> NormSpec:
        """The spec of one of the paper's six rows.

        Raises:
            ConfigError: `row` is not 1 to 6.
        """
        if not isinstance(row, int) or row not in TABLE5_ROWS:
            raise ConfigError(f"row must be one of 1 to 6; got {row!r} (Table 5). Choose one of them.")
        statistics, population, affine = TABLE5_ROWS[row]
        return cls(statistics=statistics, population=population, affine=affine, workers=workers)

    @property
    def table5_row(self) -> int | None:
        """The row of Table 5 that the answers are, or None where they are in none.

        Shared statistics with an affine per level are in none, nor is anything per domain.
        """
        answers = (self.statistics, self.population, self.affine)
        return next((row for row, cells in TABLE5_ROWS.items() if cells == answers), None)

    @property
    def owner(self) -> str | None:
        """Which kind of source owns something: "per_level", "per_domain", or None."""
        return next((answer for name in _OWNED if (answer := getattr(self, name)).startswith("per_")), None)

    @property
    def has_frozen_statistics(self) -> bool:
        return self.frozen in ("statistics", "both")

    @property
    def has_frozen_affine(self) -> bool:
        return self.frozen in ("affine", "both")

    def replace(self, **changes: object) -> NormSpec:
        """A copy with some answers changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _check_types(spec: NormSpec) -> None:
    for name in ("momentum", "eps", "r_max", "d_max"):
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            hint = " For torch's momentum=None use average='cumulative'." if name == "momentum" else ""
            raise ConfigError(f"{name} must be a number; got {value!r} (NormSpec). Write it without quotes.{hint}")
    is_right = all(isinstance(name, str) and name for name in spec.domains)
    if not is_right or len(set(spec.domains)) < len(spec.domains):
        raise ConfigError(
            f"domains must be distinct names; got {spec.domains!r} (NormSpec). Name each once, as ('day', 'night')."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_ranges(spec: NormSpec) -> None:
    if spec.workers not in ("one", "node", "all") and not _is_count(spec.workers):
        raise ConfigError(
            f"workers must be one of 'one', 'node', 'all', or a number of workers from 1 on; got {spec.workers!r} "
            f"(NormSpec). Choose one of them."
        )
    size = spec.normalization_batch_size
    if size is not None and not _is_count(size):
        raise ConfigError(
            f"normalization_batch_size must be 1 or more, or None for the whole batch; got {size!r} (NormSpec). "
            f"Choose how many samples are normalized together."
        )
    if not spec.r_max >= 1:
        raise ConfigError(f"r_max must be 1 or more; got {spec.r_max!r} (NormSpec). Use 3, or 1 for no correction.")
    if not spec.d_max >= 0:
        raise ConfigError(f"d_max must be 0 or more; got {spec.d_max!r} (NormSpec). Use 5, or 0 for no correction.")
    if not 0 < spec.momentum <= 1:
        raise ConfigError(f"momentum must be above 0 and at most 1; got {spec.momentum!r} (NormSpec). Use 0.1.")
    if not 0 < spec.eps < float("inf"):
        raise ConfigError(f"eps must be above 0; got {spec.eps!r} (NormSpec). Use 1e-5.")


def _check_domains(spec: NormSpec) -> None:
    owned = {name: answer for name in _OWNED if (answer := getattr(spec, name)).startswith("per_")}
    if len(set(owned.values())) > 1:
        raise ConfigError(
            f"statistics, population and affine must speak of levels or of domains; got {owned} (NormSpec). "
            f"Use per_level or per_domain for all that is not shared."
        )
    if "per_domain" in owned.values() and not spec.domains:
        name = next(iter(owned))
        raise ConfigError(
            f"domains must name the domains of {name}='per_domain'; got none (NormSpec). "
            f"Name them: domains=('day', 'night'), in a config MODEL.BNEXT.DOMAINS.NAMES."
        )
    if spec.domains and "per_domain" not in owned.values():
        raise ConfigError(
            f"domains must be empty where nothing is per_domain; got {spec.domains!r} (NormSpec). "
            f"Set statistics, population or affine to 'per_domain', or leave the domains out."
        )
    if spec.fallback_domain is not None and spec.fallback_domain not in spec.domains:
        raise ConfigError(
            f"fallback_domain must be one of the domains {spec.domains!r}; got {spec.fallback_domain!r} (NormSpec). "
            f"Name one of them."
        )


def _check_contradictions(spec: NormSpec) -> None:
    """Answers that exclude one another, and groups that would be without effect."""
    if spec.population == "none":
        for name, value in (("training", "population"), ("training", "renorm"), ("inference", "population")):
            if getattr(spec, name) == value:
                remedy = "inference='mini_batch'" if name == "inference" else "training='mini_batch'"
                raise ConfigError(
                    f"{name} must not be {value!r} where no population statistics are kept; got population='none' "
                    f"(NormSpec). Set {remedy}, or population='shared'."
                )
        if spec.has_frozen_statistics or spec.single_element == "population":
            name = "frozen" if spec.has_frozen_statistics else "single_element"
            raise ConfigError(
                f"{name} must not ask for population statistics where none are kept; got {getattr(spec, name)!r} with "
                f"population='none' (NormSpec). Set population='shared', or leave {name} at its default."
            )
    if spec.affine == "none" and spec.has_frozen_affine:
        raise ConfigError(
            f"frozen must be 'none' or 'statistics' where there is no affine; got {spec.frozen!r} with affine='none' "
            f"(NormSpec). Set one of them."
        )
    if spec.normalization_batch_size is not None and spec.workers not in ("one", 1):
        raise ConfigError(
            f"normalization_batch_size must be None where several workers share a mini-batch; got "
            f"{spec.normalization_batch_size!r} with workers={spec.workers!r} (NormSpec). Set workers='one' to cut the "
            f"batch of each worker into groups, or workers=k to join the batches of k workers."
        )
    if spec.normalization_batch_size is not None and spec.training == "population":
        raise ConfigError(
            f"normalization_batch_size must be None where population statistics normalize in training; got "
            f"{spec.normalization_batch_size!r} (NormSpec). Set training='mini_batch'."
        )

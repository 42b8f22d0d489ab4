"""`NormSpec`: which batch? One frozen record describes one way of doing batch normalization."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_type_hints

from bnext.errors import ConfigError

__all__ = ["TABLE5_ROWS", "NormSpec", "Sharing", "Workers"]

Sharing = Literal["shared", "per_level"]
Workers = Literal["one", "all"]

# (mini-batch statistics, population statistics, affine); Wu and Johnson 2021, Table 5.
TABLE5_ROWS: dict[int, tuple[Sharing, Sharing, Sharing]] = {
    1: ("shared", "shared", "shared"),
    2: ("shared", "per_level", "shared"),
    3: ("per_level", "shared", "shared"),
    4: ("per_level", "per_level", "shared"),
    5: ("per_level", "shared", "per_level"),
    6: ("per_level", "per_level", "per_level"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec:
    """The answers of a batch norm to the question "which batch?".

    Args:
        statistics: over which features the mini-batch statistics of SGD are computed: all levels
            of a call together ("shared") or each level alone ("per_level").
        population: which population statistics are remembered: one set, or one per level.
        affine: who owns scale and shift: all levels, or each level.
        workers: who shares a mini-batch: this worker alone ("one", as BN), or all ("all", as SyncBN).
        momentum: weight of the new value in the moving average, torch's sense; above 0, at most 1.
        eps: added to the variance; above 0.

    Raises:
        ConfigError: a value is outside its set or range.

    Example:
        >>> NormSpec(statistics="shared", population="shared").table5_row
        1
        >>> NormSpec.from_table5_row(6, workers="all").affine
        'per_level'

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, Table 5.
    """

    statistics: Sharing = "per_level"
    population: Sharing = "per_level"
    affine: Sharing = "shared"
    workers: Workers = "one"
    momentum: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("statistics", "population", "affine", "workers"):
            check_choice(name, getattr(self, name), get_args(hints[name]))
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"momentum must be above 0 and at most 1; got {self.momentum!r} (NormSpec). Use 0.1.")
        if not self.eps > 0:
            raise ConfigError(f"eps must be above 0; got {self.eps!r} (NormSpec). Use 1e-5.")

    @classmethod
    def from_table5_row(cls, row: int, *, workers: Workers = "one") -> NormSpec:
        """The spec of one of the paper's six rows.

        Raises:
            ConfigError: `row` is not 1 to 6.
        """
        if row not in TABLE5_ROWS:
            raise ConfigError(f"row must be one of 1 to 6; got {row!r} (Table 5). Choose one of them.")
        statistics, population, affine = TABLE5_ROWS[row]
        return cls(statistics=statistics, population=population, affine=affine, workers=workers)

    @property
    def table5_row(self) -> int | None:
        """The row of Table 5 that this is, or None: shared statistics with an affine per level are not in it."""
        answers = (self.statistics, self.population, self.affine)
        return next((row for row, cells in TABLE5_ROWS.items() if cells == answers), None)

    def replace(self, **changes: object) -> NormSpec:
        """A copy with some answers changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def check_choice(name: str, value: object, allowed: tuple[object, ...], where: str = "NormSpec") -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ConfigError(f"{name} must be one of {choices}; got {value!r} ({where}). Choose one of them.")

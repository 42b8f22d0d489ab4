"""The exceptions of bnext, and the one form of their messages.

    <thing> must <rule>; got <value> (<where>). <Remedy>.

All of them are `ValueError`s as well, so that code which catches torch's or detectron2's complaints about a bad value
catches ours too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bnext.text import flatten_text, suggest

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "BNextError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DomainError",
    "LaunchError",
    "Refusal",
    "StatisticsError",
    "WorkerError",
    "check_choice",
    "is_interrupted",
    "list_few",
]

_MOST_OF_A_VALUE = 1000  # characters: a value may be a whole file


class BNextError(ValueError):
    """A mistake that the user can mend; tools print its message without a traceback."""

    @classmethod
    def of(cls, thing: str, rule: str, *, got: object, where: str = "", remedy: str) -> Self:
        """The error in the one form that all messages have.

        Args:
            thing: argument, key, layer or file that is wrong.
            rule: what it must do or be, after "must".
            got: the value; a string is taken as words, so a string that the user wrote comes as `repr(value)`.
            where: path of the layer, file or function; "": the thing says it.
            remedy: whole sentences. Whoever follows them ends up right.

        Example:
            >>> print(ConfigError.of("row", "be 1 to 6", got=7, where="Table 5", remedy="Choose one of them."))
            row must be 1 to 6; got 7 (Table 5). Choose one of them.
        """
        value = flatten_text(got if isinstance(got, str) else repr(got), most=_MOST_OF_A_VALUE)
        thing, place = flatten_text(thing, most=_MOST_OF_A_VALUE), flatten_text(where, most=_MOST_OF_A_VALUE)
        place = f" ({place})" if place else ""
        remedy = flatten_text(remedy, most=_MOST_OF_A_VALUE)
        return cls(flatten_text(f"{thing} must {rule}; got {value}{place}. {remedy}"))


class ConfigError(BNextError):
    """A config key has a value outside its set, or keys contradict one another."""


class StatisticsError(BNextError):
    """Statistics of a norm layer are missing, not finite, or cannot be computed."""


class DomainError(BNextError):
    """No domain, or an unknown one, is named where statistics or an affine belong to domains."""


class CheckpointError(BNextError):
    """A checkpoint does not fit the model that it is loaded into."""


class DatasetError(BNextError):
    """A data set is missing, incomplete, or contradicts its own description."""


class LaunchError(BNextError):
    """The machine cannot run what was asked: devices, workers, or the output directory."""


class WorkerError(BNextError):
    """Another worker has failed, or did not come to a layer that all workers share."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A mistake that is refused wherever it is made: its words stand apart from the code that finds it.

    Args:
        kind: class of the error.
        thing, rule, remedy: see `BNextError.of`; names in braces are filled in by `of`.

    Example:
        >>> UNKNOWN_ROW = Refusal(ConfigError, "row", "be one of 1 to {last}", "Choose one of them.")
        >>> print(UNKNOWN_ROW.of(7, "Table 5", last=6))
        row must be one of 1 to 6; got 7 (Table 5). Choose one of them.
    """

    kind: type[BNextError]
    thing: str
    rule: str
    remedy: str

    def of(self, got: object, where: str = "", **words: object) -> BNextError:
        """The error: `raise UNKNOWN_ROW.of(row)`.

        Args:
            got, where: see `BNextError.of`.
            words: for the names in braces.
        """
        thing, rule, remedy = (text.format(**words) for text in (self.thing, self.rule, self.remedy))
        return self.kind.of(thing, rule, got=got, where=where, remedy=remedy)


def check_choice(name: str, value: object, allowed: Sequence[object], where: str = "NormSpec") -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        remedy = suggest(value, [choice for choice in allowed if isinstance(choice, str)])
        raise ConfigError.of(name, f"be one of {choices}", got=repr(value), where=where, remedy=remedy)


def is_interrupted(error: BaseException | None) -> bool:
    """Whether an error only followed from Ctrl-C, which other code, such as torch.save, hides behind its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def list_few(values: Iterable[object], most: int = 3) -> str:
    """The first values, and how many more there are.

    Example:
        >>> list_few([1, 2, 3, 4, 5])
        '1, 2, 3 and 2 more'
    """
    values = list(values)
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"

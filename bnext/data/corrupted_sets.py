"""Corrupted variants of registered sets, which need no files: `digits_val@fog_3` is `digits_val` in fog of severity 3.

A variant is registered when its name is first used. It has the metadata of its base, the same object; its records are
those of the base and name the corruption, which the mapper applies whenever it has read a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data.corruptions.names import NAMES, check_corruption
from bnext.errors import ConfigError, Refusal

__all__ = ["Variant", "find_base", "find_corruption", "mark_corrupted", "name_variant", "register_variant"]

_NO_SEVERITY = Refusal(
    ConfigError,
    "The name of a corrupted set",
    "be SET@CORRUPTION_SEVERITY",
    "Write it as {base}@{corruption}_3, with a severity from 1 to 5.",
)


@dataclass(frozen=True)
class Variant:
    """The function that a corrupted variant is registered with.

    Args:
        base: name of the set that is corrupted.
        load: its function.
        corruption, severity: see `check_corruption`.
    """

    base: str
    load: Callable[[], list[dict[str, Any]]]
    corruption: str
    severity: int

    def __call__(self) -> list[dict[str, Any]]:
        return mark_corrupted(self.load(), self.corruption, self.severity)


def mark_corrupted(records: list[dict[str, Any]], corruption: str, severity: int) -> list[dict[str, Any]]:
    """The records, each with the corruption that is applied to its picture."""
    return [{**record, "corruption": corruption, "severity": severity} for record in records]


def name_variant(base: str, corruption: str, severity: int) -> str:
    """The name under which a set's variant is registered.

    Example:
        >>> name_variant("digits_val", "fog", 3)
        'digits_val@fog_3'
    """
    return f"{base}@{corruption}_{severity}"


def register_variant(name: str) -> None:
    """Register a corrupted set under its name, if its base is registered; any other name is left alone.

    Args:
        name: such as "digits_val@fog_3".

    Raises:
        ConfigError, LaunchError: the corruption or the severity is none, see `check_corruption`.
    """
    base, mark, rest = name.rpartition("@")
    present = DatasetCatalog.data.get(name)
    if not mark or base not in DatasetCatalog or (present is not None and not isinstance(present, Variant)):
        return

    variant = Variant(base, DatasetCatalog[base], *_parse(base, rest))
    if present is not None and present != variant:  # its base has changed, such as with another config
        DatasetCatalog.remove(name)
    if present != variant:
        DatasetCatalog.register(name, variant)
    MetadataCatalog[name] = MetadataCatalog.get(base)


def _parse(base: str, rest: str) -> tuple[str, int]:
    """The corruption and the severity at the end of a name."""
    corruption, _, severity = rest.rpartition("_")
    if rest in NAMES or not severity.isdecimal():
        meant = next((name for name in (rest, corruption) if name in NAMES), "fog")
        raise _NO_SEVERITY.of(repr(f"{base}@{rest}"), base=base, corruption=meant)

    check_corruption(corruption, int(severity), f"data set '{base}@{rest}'")
    return corruption, int(severity)


def find_base(name: str) -> str:
    """The name of the set that a variant is of, registered or not yet; of any other set its name."""
    registered = DatasetCatalog.data.get(name)  # `get` of the catalog loads
    is_variant = isinstance(registered, Variant) or (registered is None and "@" in name)
    return name.rpartition("@")[0] if is_variant else name


def find_corruption(name: str) -> str:
    """The corruption of a registered set; "": none."""
    return getattr(DatasetCatalog[name], "corruption", "")

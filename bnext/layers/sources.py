"""Sources of the samples of a norm, level and domain, and who owns what of them by an answer of a spec.

A norm tells its samples apart by source: a level, a domain, a domain at a level, or nothing at all. What an answer
shares, its sources look up under one name: `Source("p3", "night").find_owner("per_domain")` is "night". Levels may go
together in groups, which are then to "per_level" what a level is: "p3-p4".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

__all__ = [
    "Origin",
    "Ownership",
    "Sharing",
    "Source",
    "add_domains",
    "add_levels",
    "drop_domains",
    "find_origin",
    "is_owned",
    "is_per_domain",
    "is_per_level",
    "list_sources",
    "map_owners",
    "name_groups",
]

Sharing = Literal["shared", "per_level", "per_domain", "per_level_and_domain"]
Ownership = Literal["shared", "per_level", "per_domain", "per_level_and_domain", "none"]


def is_per_level(answer: object) -> bool:
    """Whether an answer tells levels apart."""
    return answer in ("per_level", "per_level_and_domain")


def is_per_domain(answer: object) -> bool:
    """Whether an answer tells domains apart."""
    return answer in ("per_domain", "per_level_and_domain")


def is_owned(answer: str) -> bool:
    """Whether levels or domains have for themselves what an answer is about."""
    return answer not in ("shared", "none")


def add_levels(answer: str) -> Literal["per_level", "per_level_and_domain"]:
    """The answer that tells levels apart, and domains if an answer does."""
    return "per_level_and_domain" if is_per_domain(answer) else "per_level"


def add_domains(answer: str) -> Literal["per_domain", "per_level_and_domain"]:
    """The answer that tells domains apart, and levels if an answer does."""
    return "per_level_and_domain" if is_per_level(answer) else "per_domain"


def drop_domains(answer: str) -> str:
    """The answer that no longer tells domains apart."""
    if not is_per_domain(answer):
        return answer
    return "per_level" if is_per_level(answer) else "shared"


def name_groups(groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Level -> name of the group that it is in; one in no group is missing.

    Example:
        >>> name_groups([("p3", "p4"), ("p5",)])
        {'p3': 'p3-p4', 'p4': 'p3-p4', 'p5': 'p5'}
    """
    names = {}
    for group in groups:
        names.update(dict.fromkeys(group, "-".join(group)))
    return names


class Source(NamedTuple):
    """A level, a domain, a domain at a level; or neither, where a norm tells nothing apart.

    Example:
        >>> Source("p3", "night").name
        'night_p3'
    """

    level: str = ""
    domain: str = ""

    @property
    def name(self) -> str:
        """The name under which its state lies: "p3", "night", "night_p3", or ""."""
        return "_".join(filter(None, (self.domain, self.level)))

    def find_owner(self, answer: str, groups: Sequence[Sequence[str]] = ()) -> str:
        """Name of what owns the state of its samples, by an answer of a spec; "": all share it, or there is none.

        Args:
            answer: of the spec.
            groups: levels that go together.
        """
        level = name_groups(groups).get(self.level, self.level) if is_per_level(answer) else ""
        domain = self.domain if is_per_domain(answer) else ""
        return Source(level, domain).name


def list_sources(levels: Sequence[str], domains: Sequence[str]) -> list[Source]:
    """Every domain at every level, one domain after the other."""
    sources = []
    for domain in domains or ("",):
        sources += [Source(level, domain) for level in levels or ("",)]
    return sources


def map_owners(
    levels: Sequence[str], domains: Sequence[str], groups: Sequence[Sequence[str]] = ()
) -> dict[str, dict[str, str]]:
    """For each answer: name of a source -> name of what owns its state; `groups` of levels go together."""
    sources = list_sources(levels, domains)

    owners = {}
    for answer in get_args(Ownership):
        owners[answer] = {source.name: source.find_owner(answer, groups) for source in sources}
    return owners


class Origin(NamedTuple):
    """Names under which another norm keeps the state of a source.

    Args:
        names: one; several, where the other norm tells apart what this one does not; none, if it does not know it.
        is_shared: the source has it in common with others there.
    """

    names: list[str]
    is_shared: bool = False


def find_origin(source: Source, names: Collection[str], name_map: Mapping[str, str]) -> Origin:
    """The origin of a source in another norm: its own state there, else its pairs', its group's, its domain's, its
    level's, all's.

    Args:
        source: of a norm.
        names: under which the other norm keeps something; "" is what all share.
        name_map: name here -> name there, where they differ: of a level, a domain, or a pair.

    Example:
        >>> find_origin(Source("p3", "night"), ["p3", "p4"], {})
        Origin(names=['p3'], is_shared=True)
        >>> find_origin(Source("p3"), ["day_p3", "night_p3", "night_p4"], {})
        Origin(names=['day_p3', 'night_p3'], is_shared=False)
        >>> find_origin(Source("p3"), ["p3-p4", "p5"], {})
        Origin(names=['p3-p4'], is_shared=True)
    """
    wanted = _map_source(source, name_map)
    if wanted.name in names and (wanted.name or not source.name):
        return Origin([wanted.name])

    pairs = [] if wanted.level and wanted.domain else _list_pairs(names, wanted.name)
    if pairs:
        return Origin(pairs)

    grouped = _list_grouped(names, wanted)
    if grouped:
        return Origin(grouped, is_shared=True)

    for name in (wanted.domain, wanted.level, ""):
        if name in names:
            return Origin([name], is_shared=True)
    return Origin([])


def _map_source(source: Source, name_map: Mapping[str, str]) -> Source:
    if source.level and source.domain and source.name in name_map:
        return Source(domain=name_map[source.name])

    level = name_map.get(source.level, source.level) if source.level else ""
    return Source(level, name_map.get(source.domain, source.domain))


def _list_grouped(names: Collection[str], wanted: Source) -> list[str]:
    """The name of a group that has the level of a source, and its domain, if there is one."""
    if not wanted.level:
        return []

    start = f"{wanted.domain}_" if wanted.domain else ""
    groups = [name for name in names if "-" in name and name.startswith(start)]
    return [name for name in groups if wanted.level in name.removeprefix(start).split("-")]


def _list_pairs(names: Collection[str], half: str) -> list[str]:
    """Names of pairs of which one half is given; all, if it is ""; none, unless all names are of such pairs."""
    named = [name for name in names if name]
    if not half:
        return named

    domains = tuple(name.removesuffix(half) for name in named if name.endswith(f"_{half}"))
    if domains and all(name.startswith(domains) for name in named):
        return [f"{domain}{half}" for domain in domains]

    levels = tuple(name.removeprefix(half) for name in named if name.startswith(f"{half}_"))
    return [f"{half}{level}" for level in levels if all(name.endswith(levels) for name in named)]

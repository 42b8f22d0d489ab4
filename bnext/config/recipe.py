"""The norms of a detector as one immutable record: parsed and checked once, handed to the builders in `bnext.heads`.

A `NormRecipe` is made of plain values, so that a YAML config (`resolve_norms`) and a LazyConfig (`NormRecipe.of`)
give the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from detectron2.config import CfgNode

from bnext.config.check import check_keys, check_values
from bnext.config.keys import PLACE_KEYS
from bnext.config.places import BATCH_NORMS, PLACES
from bnext.errors import ConfigError, check_choice
from bnext.layers.build import NAMED_NORMS, NORM_NAMES
from bnext.layers.spec import NormSpec

__all__ = ["NormRecipe", "PlaceNorm", "read_place", "resolve_norms"]


@dataclasses.dataclass(frozen=True)
class PlaceNorm:
    """The norm of one place of a detector.

    Args:
        place: one of `PLACES`.
        name: "BN", "SyncBN", "FrozenBN", "GN", "LN", or "" for none.
        spec: the answers of its batch norms. (A backbone may have some whatever its key says.)
        changed: keys of its node, but NORM, that are not at their defaults.
        levels: names of the features that each norm sees; (): it sees one.
        shuffle: how RoIs are dealt out: "none", "statistics", or "features".
        shuffle_groups: of a deal of statistics, over all workers; 0: one for each.
    """

    place: str
    name: str
    spec: NormSpec
    changed: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    shuffle: str = "none"
    shuffle_groups: int = 0

    @property
    def is_batch_norm(self) -> bool:
        """Whether the name is of a batch norm of bnext, which `spec` describes."""
        return self.name in BATCH_NORMS

    @property
    def norm(self) -> NormSpec | str:
        """The spec of "BN" and "SyncBN", else the name."""
        return self.spec if self.is_batch_norm else self.name

    def make_spec(self, name: str) -> NormSpec:
        """The spec of a norm that is there already as "BN" or "SyncBN", which says who shares its mini-batches.

        Raises:
            ConfigError: the answers of the place do not go with that.
        """
        if "WORKERS" in self.changed or self.shuffle == "statistics":
            return self.spec
        return _make_spec(self.place, {**vars(self.spec), "workers": NAMED_NORMS[name].workers})

    def get_value(self, key: str) -> Any:
        """The value of a key of the place's node."""
        return vars(self).get(key.lower(), getattr(self.spec, key.lower(), None))


@dataclasses.dataclass(frozen=True)
class NormRecipe:
    """The norms of a detector.

    Args:
        places: name of each place that the detector has -> its norm.
        domains: names of the domains, wherever something is per_domain.
        fallback_domain: of samples without one; None: that is an error.
    """

    places: Mapping[str, PlaceNorm]
    domains: tuple[str, ...] = ()
    fallback_domain: str | None = None

    @classmethod
    def of(cls, nodes: Mapping[str, Mapping[str, Any]]) -> NormRecipe:
        """The recipe of plain values, as a LazyConfig has them.

        Args:
            nodes: name of a place -> its keys and their values, as in MODEL.BNEXT, and NORM at every place; and
                "DOMAINS" -> NAMES and FALLBACK. What is not there is at its default.

        Raises:
            ConfigError: a place, a key or a value is unknown, or keys contradict one another.

        Example:
            >>> recipe = NormRecipe.of({"FPN": {"NORM": "SyncBN", "MOMENTUM": 0.2}})
            >>> recipe.places["FPN"].norm == NormSpec(workers="all", momentum=0.2)
            True
        """
        domains = {"NAMES": (), "FALLBACK": "", **nodes.get("DOMAINS", {})}
        places = {}
        for place, node in nodes.items():
            if place != "DOMAINS":
                check_choice("a place", place, tuple(PLACES), where="NormRecipe")
                places[place] = _make_place(place, _complete(place, node), domains)
        return _make_recipe(places, domains)


def resolve_norms(cfg: CfgNode) -> NormRecipe:
    """The norms of a config, all of whose keys of bnext are checked.

    Raises:
        ConfigError: a key has a value outside its set, would have no effect, or contradicts another; the error names
            the key, its value, and what is allowed.
    """
    check_keys(cfg)
    places = {}
    for name, place in PLACES.items():
        has_head = not place.switch or _read_key(cfg, place.switch)
        if cfg.MODEL.META_ARCHITECTURE in place.architectures and has_head:
            places[name] = read_place(cfg, name)
    return _make_recipe(places, cfg.MODEL.BNEXT.DOMAINS)


def read_place(cfg: CfgNode, place: str) -> PlaceNorm:
    """The norm of one place of a config that was checked, for a builder of detectron2 that gets no more than that.

    Args:
        cfg: a whole config.
        place: one of `PLACES`, whether the model has it or not.
    """
    keys = PLACES[place]
    node = {**cfg.MODEL.BNEXT[place], "NORM": _read_key(cfg, keys.norm)}
    if keys.levels:
        node["LEVELS"] = _read_key(cfg, keys.levels)
    return _make_place(place, node, cfg.MODEL.BNEXT.DOMAINS)


def _read_key(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _complete(place: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a place with its defaults, checked by the table as far as they go."""
    keys, start = PLACE_KEYS[place], f"MODEL.BNEXT.{place}."
    complete = {key.name.removeprefix(start): key.default for key in keys}
    complete |= {"NORM": PLACES[place].default, "LEVELS": ()}
    for key in node:
        check_choice(f"a key of {place}", key, tuple(complete), where="NormRecipe")

    complete |= node
    values = {f"{start}{key}": value for key, value in complete.items()}
    values[PLACES[place].norm] = complete["NORM"]
    if complete["LEVELS"]:
        values[PLACES[place].levels] = complete["LEVELS"]
    check_values(keys, values)
    return complete


def _make_place(place: str, node: Mapping[str, Any], domains: Mapping[str, Any]) -> PlaceNorm:
    """The norm of a place, from all values of its node."""
    name, shuffle = node["NORM"], node.get("SHUFFLE", "none")
    check_choice(PLACES[place].norm, name, NORM_NAMES, where="config")

    answers = {field.name: node[key] for field in dataclasses.fields(NormSpec) if (key := field.name.upper()) in node}
    answers["normalization_batch_size"] = node["NORMALIZATION_BATCH_SIZE"] or None
    if node["WORKERS"] is None:
        shares = shuffle == "statistics" or name == "SyncBN"
        answers["workers"] = "all" if shares else "one"
    if "per_domain" in answers.values():
        answers |= {"domains": tuple(domains["NAMES"]), "fallback_domain": domains["FALLBACK"] or None}

    return PlaceNorm(
        place,
        name,
        _make_spec(place, answers),
        changed=_find_changed(place, node),
        levels=tuple(node.get("LEVELS", ())),
        shuffle=shuffle,
        shuffle_groups=node.get("SHUFFLE_GROUPS", 0),
    )


def _find_changed(place: str, node: Mapping[str, Any]) -> tuple[str, ...]:
    defaults = {key.name.rpartition(".")[2]: key.default for key in PLACE_KEYS[place]}
    return tuple(key for key, default in defaults.items() if key != "NORM" and node[key] != default)


def _make_spec(place: str, answers: Mapping[str, Any]) -> NormSpec:
    try:
        return NormSpec(**answers)
    except ConfigError as error:
        raise ConfigError(f"MODEL.BNEXT.{place}: {error}") from error


def _make_recipe(places: dict[str, PlaceNorm], domains: Mapping[str, Any]) -> NormRecipe:
    return NormRecipe(MappingProxyType(places), tuple(domains["NAMES"]), domains["FALLBACK"] or None)

"""The norms of a detector as one immutable record: parsed and checked once, handed to the builders in `bnext.heads`.

A `NormRecipe` is made of plain values, so that a YAML config (`resolve_norms`) and a LazyConfig (`NormRecipe.of`)
give the same one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from detectron2.config import CfgNode

from bnext.config.check import check_keys, check_values, flatten, leave_out_unused
from bnext.config.keys import KEYS, PLACE_KEYS
from bnext.config.norm_names import check_norm_name
from bnext.config.places import BATCH_NORMS, PLACES
from bnext.data.domains import find_norm_domains
from bnext.errors import ConfigError, Refusal, check_choice
from bnext.layers.build import NAMED_NORMS
from bnext.layers.sources import is_per_domain
from bnext.layers.spec import OWNED, NormSpec, Unseen
from bnext.lazy_config import is_lazy

__all__ = ["NormRecipe", "PlaceNorm", "read_place", "resolve_norms"]

NO_POPULATIONS = Refusal(
    ConfigError,
    "MODEL.BNEXT.DOMAINS.UNSEEN",
    "be another rule where no place has a population for each domain",
    "Set POPULATION of a place to 'per_domain', or choose 'mixture', 'blend' or 'mini_batch'.",
)
NAMES = "MODEL.BNEXT.DOMAINS.NAMES"
NO_NAMES = Refusal(
    ConfigError,
    "DATASETS.DOMAINS.TRAIN",
    "say of which domain each set of DATASETS.TRAIN is, where norms have something per domain",
    "Write one name for each set, such as ('day', 'night'), or name the domains in " + NAMES + ".",
)
_PLACE_ROWS = tuple(key for keys in PLACE_KEYS.values() for key in keys)


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
        return {**vars(self.spec), **vars(self)}[key.lower()]


@dataclasses.dataclass(frozen=True)
class NormRecipe:
    """The norms of a detector.

    Args:
        places: name of each place that the detector has -> its norm.
        domains: names of the domains, wherever an answer tells them apart.
        unseen: the rule for samples of another domain, or of none, at inference.
        fallback_domain: the one that the rule "fallback" takes.
    """

    places: Mapping[str, PlaceNorm]
    domains: tuple[str, ...] = ()
    unseen: Unseen = "error"
    fallback_domain: str | None = None

    @classmethod
    def of(cls, nodes: Mapping[str, Mapping[str, Any]]) -> NormRecipe:
        """The recipe of plain values, as a LazyConfig has them.

        Args:
            nodes: name of a place -> its keys and their values, as in MODEL.BNEXT, and NORM and LEVELS at every place;
                and "DOMAINS" -> NAMES, UNSEEN, FALLBACK and SOURCE_IMAGES. What is not there is at its default.

        Raises:
            ConfigError: a place, a key or a value is unknown, or keys contradict one another.

        Example:
            >>> recipe = NormRecipe.of({"FPN": {"NORM": "SyncBN", "MOMENTUM": 0.2}})
            >>> recipe.places["FPN"].norm == NormSpec(workers="all", momentum=0.2)
            True
        """
        values = {name: key.default for name, key in KEYS.items() if name.startswith("MODEL.BNEXT.")}
        checked = []
        for node, keys in nodes.items():
            check_choice("a node", node, (*PLACES, "DOMAINS"), where="NormRecipe")
            names = _name_keys(node)
            if node in PLACES:
                values[names["NORM"]] = PLACES[node].default

            for key, value in keys.items():
                check_choice(f"a key of {node}", key, tuple(names), where="NormRecipe")
                values[names[key]] = value
            checked += [KEYS[name] for name in names.values() if name in KEYS]

        check_values(checked, values)
        return _make_recipe([place for place in PLACES if place in nodes], values, leave_out_unused(checked, values))


def resolve_norms(cfg: CfgNode, *, says_unused: bool = True) -> NormRecipe:
    """The norms of a config, all of whose keys of bnext are checked.

    Args:
        cfg: a whole config.
        says_unused: whether keys that a norm has no use for are logged, once in this process.

    Raises:
        ConfigError: a key has a value outside its set, would have no effect, or contradicts another; the error names
            the key, its value, and what is allowed.
    """
    values = _name_domains(cfg)
    check_keys(values)
    if is_lazy(cfg):
        try:
            return NormRecipe.of(_name_lazy_domains(cfg))
        except ConfigError as error:
            raise ConfigError(_name_lazily(str(error))) from error

    present = []
    for name, place in PLACES.items():
        is_on = not place.switch or values[place.switch]
        if values["MODEL.META_ARCHITECTURE"] in place.architectures and is_on:
            present.append(name)
    return _make_recipe(present, values, leave_out_unused(_PLACE_ROWS, values, says_unused))


def _name_lazily(text: str) -> str:
    """A message with the names of a LazyConfig's `norms`."""
    for name, place in PLACES.items():
        text = text.replace(place.norm, f"norms.{name}.NORM")
        if place.levels:
            text = text.replace(place.levels, f"norms.{name}.LEVELS")
    return text.replace("MODEL.BNEXT.", "norms.").replace("a node must", "a place in `norms` must")


def read_place(cfg: CfgNode, place: str) -> PlaceNorm:
    """The norm of one place of a config that was checked, for a builder of detectron2 that gets no more than that.

    Args:
        cfg: a whole config.
        place: one of `PLACES`, whether the model has it or not.
    """
    return _make_place(place, leave_out_unused(_PLACE_ROWS, _name_domains(cfg)))


def _name_domains(cfg: CfgNode) -> dict[str, Any]:
    """The values of a config by their keys; the norms' domains are those of the training sets, unless it names them."""
    values = flatten(cfg)
    if not values.get(NAMES, True) and any(is_per_domain(values.get(key.name)) for key in _PLACE_ROWS):
        values[NAMES] = find_norm_domains(cfg)
    return values


def _name_lazy_domains(cfg: CfgNode) -> dict[str, Any]:
    nodes = dict(cfg.LAZY.NORMS)
    places = [node for name, node in nodes.items() if name in PLACES]
    has_domains = any(map(is_per_domain, itertools.chain.from_iterable(node.values() for node in places)))

    domains = dict(nodes.get("DOMAINS") or {})
    if has_domains and not domains.get("NAMES"):
        nodes["DOMAINS"] = {**domains, "NAMES": find_norm_domains(cfg)}
    return nodes


def _name_keys(node: str) -> dict[str, str]:
    """Key of a node of plain values -> its whole name in a config."""
    start = f"MODEL.BNEXT.{node}."
    names = {name.removeprefix(start): name for name in KEYS if name.startswith(start)}
    if node in PLACES:
        names["NORM"] = PLACES[node].norm
    if node in PLACES and PLACES[node].levels:
        names["LEVELS"] = PLACES[node].levels
    return names


def _make_recipe(places: Iterable[str], values: Mapping[str, Any], used: Mapping[str, Any]) -> NormRecipe:
    """The recipe of places, from values by the whole names of their keys, and from those that have an effect."""
    norms = {place: _make_place(place, used) for place in places}
    has_domains = any(norm.spec.domains for norm in norms.values())
    had_domains = any(is_per_domain(values[name]) for name in values if used[name] != values[name])

    for key in (name for name in KEYS if name.startswith("MODEL.BNEXT.DOMAINS.")):
        if values[key] != KEYS[key].default and not has_domains and not had_domains:
            rule = "keep its default unless STATISTICS, POPULATION or AFFINE of a place tells domains apart"
            remedy = "Set one to 'per_domain', such as MODEL.BNEXT.RESNETS.POPULATION, or remove the key."
            raise ConfigError.of(key, rule, got=repr(values[key]), where="config", remedy=remedy)

    if not has_domains:
        return NormRecipe(MappingProxyType(norms))
    domains, fallback = values[NAMES], values["MODEL.BNEXT.DOMAINS.FALLBACK"]
    unseen = values["MODEL.BNEXT.DOMAINS.UNSEEN"]
    if unseen == "nearest" and not any("domain" in norm.spec.population for norm in norms.values()):
        raise NO_POPULATIONS.of(repr(unseen), "config")
    return NormRecipe(MappingProxyType(norms), tuple(domains), unseen, fallback or None)


def _make_place(name: str, values: Mapping[str, Any]) -> PlaceNorm:
    place = PLACES[name]
    norm = values[place.norm]
    check_norm_name(name, norm)

    answers: dict[str, Any] = {}
    changed = []
    for key in PLACE_KEYS[name]:
        short, value = key.name.rpartition(".")[2], values[key.name]
        answers[short.lower()] = value
        if short != "NORM" and value != key.default:
            changed.append(short)

    answers.pop("norm", None)
    shuffle, shuffle_groups = answers.pop("shuffle", "none"), answers.pop("shuffle_groups", 0)
    if answers["normalization_batch_size"] == 0:
        answers["normalization_batch_size"] = None
    if answers["workers"] is None:
        answers["workers"] = "all" if norm == "SyncBN" or shuffle == "statistics" else "one"
    if any(is_per_domain(answers[owned]) for owned in OWNED):
        if not values[NAMES]:
            raise NO_NAMES.of("none", f"MODEL.BNEXT.{name}")
        answers["domains"] = tuple(values[NAMES])
        answers["unseen"] = values["MODEL.BNEXT.DOMAINS.UNSEEN"]
        answers["fallback_domain"] = values["MODEL.BNEXT.DOMAINS.FALLBACK"] or None
        source_images = values["MODEL.BNEXT.DOMAINS.SOURCE_IMAGES"]
        answers["source_images"] = "auto" if source_images is None else source_images

    spec, levels = _make_spec(name, answers), tuple(values.get(place.levels, ()))
    return PlaceNorm(name, norm, spec, tuple(changed), levels, shuffle, shuffle_groups)


def _make_spec(place: str, answers: Mapping[str, Any]) -> NormSpec:
    try:
        return NormSpec(**answers)
    except ConfigError as error:
        raise ConfigError(f"MODEL.BNEXT.{place}: {error}") from error

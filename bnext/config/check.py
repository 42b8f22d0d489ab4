"""The check of bnext's config keys: each against its row of the table, and the few rules that no row can say."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode

from bnext.config.keys import KEYS, Key, Need
from bnext.config.norm_names import check_norm_name
from bnext.config.places import PLACES
from bnext.data.check_classes import check_class_keys
from bnext.data.listed_sets import check_listed_sets
from bnext.errors import ConfigError
from bnext.notices import tell_once
from bnext.surgery.schedules import check_points
from bnext.text import suggest

__all__ = ["check_keys", "check_values", "flatten", "leave_out_unused"]

log = logging.getLogger(__name__)


def check_keys(values: Mapping[str, Any]) -> None:
    """Refuse keys of bnext that have a value outside their sets, contradict one another, or would have no effect.

    SOLVER.OPTIMIZER, a key that other projects have as well, is left to those who read it.

    Args:
        values: of a whole config, see `flatten`.

    Raises:
        ConfigError: names the key, its value, and what is allowed.
    """
    if "MODEL.BNEXT.FPN.EPS" not in values:
        raise ConfigError.of(
            "MODEL.BNEXT",
            "be in the config",
            got="a config without it",
            remedy="Call bnext.add_bnext_config(cfg) after get_cfg() and before merge_from_file.",
        )

    for name, place in PLACES.items():
        if place.has_norm_of_ours:
            check_norm_name(name, values[place.norm])
    check_values([key for key in KEYS.values() if ".BNEXT." in key.name], values)
    check_listed_sets(values["DATASETS.BNEXT.COCO"])
    check_class_keys(values["DATASETS.BNEXT.CLASSES"], values["DATASETS.BNEXT.CLASS_MAP"])
    _check_iterations(values)
    _check_num_iter(values)


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Whole name of a key, such as "MODEL.FPN.NORM", -> its value."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def check_values(keys: Iterable[Key], values: Mapping[str, Any]) -> None:
    """Refuse a value outside its set, and one that lacks what it needs.

    Args:
        keys: rows of the table.
        values: whole name -> value, of these keys and of others. A need of a key that is not there is not checked.

    Raises:
        ConfigError: names the key, its value, and what is allowed.
    """
    for key in keys:
        value = values[key.name]
        if key.values is not None and not key.values.accepts(value):
            rule = f"be {key.values.words}"
            remedy = suggest(value, key.values.names, key.values.remedy)
            raise ConfigError.of(key.name, rule, got=repr(value), where="config", remedy=remedy)

        if value != key.default:
            for need in key.needs:
                if not need.is_said and not _is_met(need, value, values):
                    raise _refuse(key.name, value, need, values)


def leave_out_unused(keys: Iterable[Key], values: Mapping[str, Any], says_so: bool = True) -> dict[str, Any]:
    """The same values, but the defaults for keys that the norm of their place has no use for, which is said once.

    So a config runs with whatever norm a command line gives it.

    Args:
        keys: rows of the table, checked by `check_values`.
        values: whole name -> value.
        says_so: False: nothing is said yet.
    """
    used = dict(values)
    reasons: dict[str, list[str]] = {}

    for key in keys:
        value = values[key.name]
        if value == key.default:
            continue
        unmet = [need for need in key.needs if need.is_said and not _is_met(need, value, values)]
        if unmet:
            used[key.name] = key.default
            others = " and ".join(f"{other} is {values[other]!r}" for other in list(unmet[0].conditions)[:1])
            reasons.setdefault(others, []).append(key.name)

    for reason, names in reasons.items() if says_so else ():
        verb = "has" if len(names) == 1 else "have"
        tell_once(log, (reason, *names), "%s %s no effect, as %s.", ", ".join(names), verb, reason)
    return used


def _is_met(need: Need, value: Any, values: Mapping[str, Any]) -> bool:
    """Whether a value has what it needs, as far as that is known."""
    is_known = need.conditions.keys() <= values.keys()
    is_in_need = need.of is None or need.of.accepts(value)
    if not is_known or not is_in_need:
        return True
    return any(allowed.accepts(values[other]) for other, allowed in need.conditions.items())


def _refuse(name: str, value: Any, need: Need, values: Mapping[str, Any]) -> ConfigError:
    """The error for a value of a key whose need is not met."""
    conditions = " or ".join(f"{other} is {allowed.words}" for other, allowed in need.conditions.items())
    others = ", ".join(f"{other} is {values[other]!r}" for other in need.conditions)
    remedy = f"Set {' or '.join(need.conditions)} so, or remove the key"
    return ConfigError.of(
        name,
        f"keep its default unless {conditions}",
        got=repr(value),
        where=others,
        remedy=f"{remedy}: {need.reason}." if need.reason else f"{remedy}.",
    )


def _check_iterations(values: Mapping[str, Any]) -> None:
    """Refuse a freeze outside the training, and schedules whose points are none."""
    start, max_iter = values["SOLVER.BNEXT.FREEZE.ITER"], values["SOLVER.MAX_ITER"]
    if not -1 <= start < max_iter:
        raise ConfigError.of(
            "SOLVER.BNEXT.FREEZE.ITER",
            f"be an iteration of the training, 0 to {max_iter - 1}, or -1 for never",
            got=start,
            where=f"SOLVER.MAX_ITER is {max_iter}",
            remedy="Freeze earlier, or set -1.",
        )

    for name in ("SOLVER.BNEXT.MOMENTUM", "SOLVER.BNEXT.RENORM.R_MAX", "SOLVER.BNEXT.RENORM.D_MAX"):
        if len(values[name]):
            check_points(values[name], name, quantity=name.rpartition(".")[2].lower(), where="config")


def _check_num_iter(values: Mapping[str, Any]) -> None:
    """Refuse a key of detectron2's whose own hook asserts it when the training has begun."""
    num_iter = values["TEST.PRECISE_BN.NUM_ITER"]

    if values["TEST.PRECISE_BN.ENABLED"] and num_iter < 1:
        raise ConfigError.of(
            "TEST.PRECISE_BN.NUM_ITER",
            "be 1 or more where TEST.PRECISE_BN.ENABLED is True",
            got=num_iter,
            where="config",
            remedy="Use so many batches as make some 4,000 images.",
        )

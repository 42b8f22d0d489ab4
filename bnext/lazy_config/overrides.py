"""Overrides of a LazyConfig, `key=value`: of keys that are there, or of arguments that a call takes."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnext.errors import ConfigError, Refusal
from bnext.lazy_config.calls import find_arguments, locate_target
from bnext.text import find_near

__all__ = ["apply_overrides", "list_names"]

_UNKNOWN = Refusal(ConfigError, "{key}", "be a key of the LazyConfig", "{remedy}")
_UNREADABLE = Refusal(
    ConfigError,
    "An override",
    "be key=value, in Hydra's grammar",
    "Put a value with special characters into quotes: 'key=\"value\"'.",
)


def apply_overrides(config: DictConfig, overrides: Sequence[str], where: str, known: Iterable[str] = ()) -> None:
    """Put `key=value` words into a LazyConfig, whose interpolations follow.

    Args:
        config: is changed.
        overrides: in Hydra's grammar, as detectron2's lazyconfig_train_net takes them; `+key=value` adds a new key.
        where: the file, for errors.
        known: keys that may be added as well; "name.*": all below that name; "*": all.

    Raises:
        ConfigError: a key is unknown, or a value cannot be read.
    """
    for word in overrides:
        key, value, is_new = _parse(word)
        _check_key(config, key, where, is_new, list(known))
        try:
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise _UNREADABLE.of(f"{word!r}: {str(error).splitlines()[0]}", where) from error


def _parse(word: str) -> tuple[str, Any, bool]:
    """Key, value, and whether it is meant to be a new key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # takes 0.2 s

    try:
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override() or override.is_delete():
            raise ValueError("a sweep" if override.is_sweep_override() else "a deletion")
        return override.key_or_group, override.value(), override.is_add()
    except Exception as error:  # of the grammar
        key, _, text = word.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # a Python value, such as a tuple
            return key.lstrip("+"), ast.literal_eval(text), key.startswith("+")
        raise _UNREADABLE.of(f"{word!r}: {str(error).splitlines()[0]}") from error


def _check_key(config: DictConfig, key: str, where: str, is_new: bool, known: Sequence[str]) -> None:
    """Refuse a key that is not there, unless a call takes it or it is known otherwise."""
    if "*" in known or key in known or any(name.endswith(".*") and key.startswith(name[:-1]) for name in known):
        return

    node: Any = config
    parts = key.split(".")
    for index, part in enumerate(parts):
        is_last = index + 1 == len(parts)
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in node:
            node = node[part]
        elif isinstance(node, DictConfig) and is_last and (is_new or _takes(node, part, parts[:-1], where)):
            return
        elif isinstance(node, DictConfig) and is_new and "_target_" not in node and not _find_near(config, key, known):
            return  # all that is below it is new, too
        else:
            raise _refuse(config, key, where, known, is_new)


def _takes(node: DictConfig, name: str, path: Sequence[str], where: str) -> bool:
    if "_target_" not in node:
        return False
    arguments = find_arguments(locate_target(node, ".".join(path), where))
    return arguments is None or name in arguments


def _refuse(config: DictConfig, key: str, where: str, known: Sequence[str], is_new: bool) -> Exception:
    near = _find_near(config, key, known)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"To add a new one, write +{key}=..."
    if is_new and not near:
        remedy = "What it is to be a part of takes none of that name: correct it, or write it into the file."
    return _UNKNOWN.of(f"{key!r}, which is none", where, key=key, remedy=remedy)


def _find_near(config: DictConfig, key: str, known: Sequence[str]) -> list[str]:
    """Keys that may have been meant: of a like name, else of the same last part."""
    names = [*list_names(config), *(name for name in known if not name.endswith(".*"))]
    names = [name for name in names if not key.startswith(f"{name}.")]
    last = key.rpartition(".")[2].casefold()
    elsewhere = [name for name in names if name.rpartition(".")[2].casefold() == last]
    return find_near(key, names, most=2, cutoff=0.7) or find_near(key, elsewhere, most=2, cutoff=0.0)


def list_names(node: Any, prefix: str = "") -> list[str]:
    """Whole names of all keys below a node, of calls their arguments among them."""
    names: list[str] = []
    if not isinstance(node, DictConfig):
        return names

    keys = [str(key) for key in node]
    if "_target_" in node:
        arguments = find_arguments(locate_target(node, prefix.rstrip("."))) or []
        keys = list(dict.fromkeys([*(key for key in keys if key != "_target_"), *arguments]))
    for key in keys:
        names.append(f"{prefix}{key}")
        with contextlib.suppress(OmegaConfBaseException):  # a value that is missing
            names += list_names(node.get(key), f"{prefix}{key}.")
    return names

"""The calls in a LazyConfig, checked before any is made: targets that there are, and arguments that they take."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from bnext.errors import ConfigError, Refusal
from bnext.text import suggest

__all__ = ["check_calls", "find_arguments", "locate_target"]

_UNKNOWN_TARGET = Refusal(ConfigError, "{name}._target_", "be a function or class that can be imported", "{remedy}")
_UNKNOWN_ARGUMENT = Refusal(ConfigError, "{name}", "be an argument of {target}", "{remedy}")
_NO_VALUE = Refusal(ConfigError, "{name}", "have a value", "Give it one, or correct the key that it refers to.")


def check_calls(config: DictConfig, names: Iterable[str], where: str) -> None:
    """Refuse calls that cannot be made, and values that refer to none.

    Args:
        config: of a whole file.
        names: top-level names that are looked at.
        where: the file, for errors.

    Raises:
        ConfigError: names the key.
    """
    for name in names:
        if name in config:
            _check(config, name, name, where)


def _check(parent: Any, key: Any, name: str, where: str) -> None:
    try:
        value = parent[key]
    except OmegaConfBaseException as error:  # "???", or "${...}" that leads nowhere
        raise _NO_VALUE.of(str(error).partition("\n")[0], where, name=name) from error

    if isinstance(value, ListConfig):
        for index in range(len(value)):
            _check(value, index, f"{name}[{index}]", where)
    elif isinstance(value, DictConfig):
        if "_target_" in value:
            _check_call(value, name, where)
        for child in map(str, value):
            if child != "_target_":
                _check(value, child, f"{name}.{child}", where)


def _check_call(node: DictConfig, name: str, where: str) -> None:
    target = locate_target(node, name, where)
    arguments = find_arguments(target)
    if arguments is None:
        return

    for key in map(str, node):
        if key != "_target_" and key not in arguments:
            called = getattr(target, "__qualname__", repr(target))
            remedy = suggest(key, arguments, f"It takes {', '.join(arguments)}." if arguments else "Remove it.")
            raise _UNKNOWN_ARGUMENT.of(repr(key), where, name=f"{name}.{key}", target=called, remedy=remedy)


def locate_target(node: DictConfig, name: str, where: str = "") -> Callable[..., Any] | None:
    """The function or class that a node calls; None: it is to be made itself.

    Raises:
        ConfigError: there is none of that name.
    """
    target = node["_target_"]
    if isinstance(target, DictConfig):
        return None
    if not isinstance(target, str):
        return target if callable(target) else None

    try:
        function = locate(target)
    except Exception as error:  # whatever importing it raises
        raise _refuse_target(name, target, where, error) from error
    if not callable(function):
        raise _refuse_target(name, target, where)
    return function


def _refuse_target(name: str, target: str, where: str, error: Exception | None = None) -> Exception:
    module, _, last = target.rpartition(".")
    names: list[str] = []
    if module:
        try:
            names = [f"{module}.{each}" for each in dir(importlib.import_module(module)) if each[0] != "_"]
        except Exception as cause:  # whatever importing it raises
            remedy = f"Its module cannot be imported: {type(cause).__name__}: {cause}."
            return _UNKNOWN_TARGET.of(repr(target), where, name=name, remedy=remedy)
    remedy = suggest(target, names, "Correct it, or import the function itself and take LazyCall.", most=1)
    return _UNKNOWN_TARGET.of(repr(target), where, name=name, remedy=remedy)


def find_arguments(target: Callable[..., Any] | None) -> list[str] | None:
    """The names of a function's arguments; None: it takes any, or does not say."""
    try:
        parameters = inspect.signature(target).parameters.values() if target is not None else ()
    except (TypeError, ValueError):  # of a function in C
        return None
    if target is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]

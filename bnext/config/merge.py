"""Values into the nodes of a config: each under a key that is there, and of the type of its default."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode

from bnext.config.check import flatten
from bnext.config.read import BASE, NO_KEYS
from bnext.errors import ConfigError, Refusal, list_few
from bnext.numbers import is_number
from bnext.text import find_near, suggest

__all__ = ["convert_value", "merge_pairs", "merge_values", "split_pairs"]

_PLAIN = (str, int, float, bool, tuple, list, type(None))
_MOST_LETTERS = 100_000  # of a literal
_MOST_DIGITS = 1e15  # a float up to here is a whole number exactly

_UNKNOWN = Refusal(ConfigError, "{key}", "be a key of Detectron2 or bnext", "{remedy}")
_NO_NAME = Refusal(ConfigError, "Every key in {place}", "be a name", "Put it in quotes, or correct it.")
_NULL = Refusal(ConfigError, "{key}", "have a value", "Write {form}, or remove the key.")
_TYPE = Refusal(ConfigError, "{key}", "be {kind}", "Write {form}.")
_IS_SECTION = Refusal(
    ConfigError, "{key}", "be followed by a key of that section", "Write {key}.<KEY>, such as {example}."
)
_IS_ODD = Refusal(
    ConfigError,
    "KEY VALUE pairs",
    "be pairs, each of a key and its value",
    "Give the last one its value; a value with spaces needs quotes.",
)


def merge_values(cfg: CfgNode, values: Mapping[Any, Any], defaults: CfgNode, where: str) -> None:
    """Put the values of a file into a config.

    Args:
        cfg: is changed.
        values: section -> key -> value.
        defaults: a config that says which keys there are, and of which types.
        where: the file, for errors.

    Raises:
        ConfigError: names the key, its value and the rule.
    """
    _merge_section(cfg, values, defaults, where, "", tuple(flatten(defaults)))


def _merge_section(
    node: CfgNode, values: Mapping[Any, Any], defaults: CfgNode, where: str, prefix: str, known: Sequence[str]
) -> None:
    for key, value in values.items():
        if not isinstance(key, str):
            raise _NO_NAME.of(repr(key), where, place=prefix.rstrip(".") or "the file")
        name = f"{prefix}{key}"
        if key not in defaults:
            raise _refuse_unknown(name, known, where, value)

        default = defaults[key]
        if not isinstance(default, CfgNode):
            node[key] = convert_value(name, value, default, where)
        elif isinstance(value, Mapping):
            _merge_section(node[key], value, default, where, f"{name}.", known)
        else:
            raise NO_KEYS.of("null" if value is None else repr(value), where, thing=name)


def split_pairs(words: Sequence[Any]) -> list[str]:
    """KEY VALUE KEY VALUE ... of words among which KEY=VALUE may stand, too.

    Example:
        >>> split_pairs(["SOLVER.MAX_ITER=10", "OUTPUT_DIR", "a=b"])
        ['SOLVER.MAX_ITER', '10', 'OUTPUT_DIR', 'a=b']
    """
    pairs: list[str] = []
    waiting = list(map(str, words))
    while waiting:
        key, sign, value = waiting.pop(0).partition("=")
        pairs += [key, value] if sign else [key, *waiting[:1]]
        del waiting[: 0 if sign else 1]
    return pairs


def merge_pairs(cfg: CfgNode, pairs: Sequence[Any], defaults: CfgNode) -> None:
    """Put KEY VALUE KEY VALUE ... into a config; of two pairs with one key the later one counts.

    Args:
        cfg: is changed.
        pairs: keys, and values as Python literals or plain words.
        defaults: a config that says which keys there are, and of which types.

    Raises:
        ConfigError: names the key, its value and the rule.
    """
    where, known = "KEY VALUE pairs", tuple(flatten(defaults))
    if len(pairs) % 2:
        raise _IS_ODD.of(f"{len(pairs)} words", " ".join(map(str, pairs)))

    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        *path, key = str(name).split(".")
        node, default = cfg, defaults
        for part in path:
            is_there = isinstance(default, CfgNode) and part in default
            if not is_there or not isinstance(default[part], CfgNode):
                raise _refuse_unknown(name, known, where)
            node, default = node[part], default[part]

        if key not in default:
            raise _refuse_unknown(name, known, where)
        if isinstance(default[key], CfgNode):
            example = next(other for other in known if other.startswith(f"{name}."))
            raise _IS_SECTION.of(repr(value), where, key=name, example=example)
        node[key] = convert_value(name, value, default[key], where)


def _refuse_unknown(name: Any, known: Sequence[str], where: str, value: Any = None) -> Exception:
    """The error for a key that nobody knows, with keys of the same name in other sections, or of a near one."""
    if isinstance(value, Mapping):
        sections = dict.fromkeys(key.rpartition(".")[0] for key in known)
        remedy = suggest(name, sections, "Correct it, or remove it.", most=1)
        return _UNKNOWN.of(f"{name!r} with {list_few(value)}", where, key=name, remedy=remedy)
    if str(name).rpartition(".")[2] == BASE:
        remedy = f"{BASE} stands at the top of a file, outside of all sections."
        return _UNKNOWN.of(f"{BASE} in another place", where, key=name, remedy=remedy)

    last = {other: other.rpartition(".")[2] for other in known}
    key = str(name).rpartition(".")[2]
    elsewhere = [other for other in known if last[other].casefold() == key.casefold()]
    near = find_near(name, elsewhere, cutoff=0.0) or find_near(name, known, cutoff=0.8)
    if not near:
        words = find_near(key, dict.fromkeys(last.values()), cutoff=0.75)
        near = find_near(name, [other for other in known if last[other] in words], cutoff=0.0)

    remedy = f"Did you mean {' or '.join(near)}?" if near else "Correct it, or remove it."
    return _UNKNOWN.of(f"{str(name)!r}, which is none", where, key=name, remedy=remedy)


# ---- types


def convert_value(name: str, value: Any, default: Any, where: str) -> Any:
    """A value as the default's type; a text may be a literal, as yacs has it.

    Args:
        name: of the key, for errors.
        where: the file, for errors.

    Raises:
        ConfigError: it is of another type.
    """
    is_text = isinstance(default, str)
    if isinstance(value, str):
        literal = _read_literal(value)
        is_number = type(literal) in (int, float)  # which a folder may be called
        value = value if is_text and is_number else literal
        if isinstance(default, list) and isinstance(value, str) and value.lstrip().startswith(("[{", "[[")):
            value = _read_nested(value)

    if value is None and default is not None:
        raise _NULL.of("null", where, key=name, form=_FORMS[type(default)])
    if default is None:
        if type(value) not in _PLAIN:
            raise _TYPE.of(_show(value), where, key=name, kind="a number, a word or a list", form="one of them")
        return value

    if type(default) is float and type(value) in (int, float):
        return _to_float(name, value, where)
    if type(default) is int and isinstance(value, float) and value.is_integer() and abs(value) < _MOST_DIGITS:
        return int(value)  # such as 1e5
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        _check_items(name, value, default, where)
        return type(default)(value)
    if type(value) is not type(default):
        form = _FORMS[type(default)]
        if isinstance(default, list) and isinstance(value, Mapping):
            form = _list_mapping(value)
        elif isinstance(default, (list, tuple)) and isinstance(value, (str, int, float)):
            form = f'"{_split(value) if isinstance(value, str) else [value]}"'
        raise _TYPE.of(_show(value), where, key=name, kind=_KINDS[type(default)], form=form)
    return value


def _list_mapping(value: Mapping[Any, Any]) -> str:
    """A mapping, written as a list: of pairs, if these are names and numbers."""
    is_pairs = all(is_number(number) for number in value.values())
    pairs = ", ".join(f"[{name}, {number}]" for name, number in value.items())
    return f"pairs, [{pairs}]" if is_pairs else "it in brackets, [{...}]"


def _split(text: str) -> list[str]:
    """The items of a list without quotes, as a shell takes them off: "(a, b)" -> ["a", "b"]."""
    items = text.strip().strip("()[]").split(",")
    return [item.strip().strip("'\"") for item in items if item.strip()]


_KINDS = {str: "a string", bool: "True or False", int: "a whole number", float: "a number"}
_KINDS |= {list: "a list", tuple: "a list"}
_FORMS = {str: "a string in quotes, '' for none", bool: "True or False", int: "a whole number", float: "a number"}
_FORMS |= {list: "a list, [] for none", tuple: "a list, [] for none"}


def _read_literal(text: str) -> Any:
    """The Python value that a text writes out, or the text."""
    if len(text) > _MOST_LETTERS:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of words that begin like a number
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two of 1,000 brackets
        return text


def _read_nested(text: str) -> Any:
    """The mappings or lists that a text lists as YAML does, without quotes; or the text."""
    try:
        return yaml.safe_load(text) if len(text) <= _MOST_LETTERS else text
    except yaml.YAMLError:
        return text


def _to_float(name: str, value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise _TYPE.of(
            "a number of 300 digits or more", where, key=name, kind="a number", form="a smaller one"
        ) from error


def _check_items(name: str, value: Sequence[Any], default: Sequence[Any], where: str) -> None:
    """Refuse items of a list that are of another kind than those of its default."""
    kinds = {_find_kind(item) for item in _list_leaves(default)}
    if len(kinds) != 1:
        return  # there is none, or there are several

    kind = kinds.pop()
    for item in _list_leaves(value):
        if _find_kind(item) is not kind:
            words = {str: "strings", bool: "True or False", float: "numbers"}[kind]
            raise _TYPE.of(_show(item), where, key=name, kind=f"a list of {words}", form=f"only {words} into it")


def _find_kind(value: Any) -> type:
    return float if type(value) in (int, float) else type(value)


def _list_leaves(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value]
    leaves = []
    for item in value:
        leaves += _list_leaves(item)
    return leaves


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a section with {list_few(value)}"
    return "null" if value is None else f"{value!r}, of type {type(value).__name__}"

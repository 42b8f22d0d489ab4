"""YAML files as plain values, with their bases: read safely, whoever wrote them; no text of a file is ever run."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from bnext.config.arithmetic import compute
from bnext.config.files import find_config_file, find_near_configs
from bnext.errors import ConfigError, LaunchError, Refusal

__all__ = ["BASE", "NO_KEYS", "read_bases", "read_file"]

BASE = "_BASE_"
_MOST_BYTES, _MOST_VALUES = 1_000_000, 100_000  # a config has some 10,000 bytes
# Of a path; others, such as a broken disk, are no fault of the config.
_OF_A_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)

_NO_FILE = Refusal(ConfigError, "{thing}", "be a YAML file", "Correct the path.")
_NO_SUCH_FILE = Refusal(ConfigError, "{thing}", "be a YAML file", "Did you mean {near}?")
_NO_YAML = Refusal(ConfigError, "{thing}", "be YAML text", "Correct {line}.")
NO_KEYS = Refusal(
    ConfigError,
    "{thing}",
    "hold keys and their values, such as SOLVER: {{MAX_ITER: 90000}}",
    "Write each key with a colon and its value.",
)
_TAG = Refusal(
    ConfigError,
    "{thing}",
    "be plain YAML, as a tag can run code",
    "Write the values themselves in its place: a tuple as [1, 2], and what is to be computed as its result.",
)
_TWICE = Refusal(
    ConfigError,
    "{thing}",
    "have each key once, as the last one alone would count",
    "Leave one out, or join the sections.",
)
_NO_BASE = Refusal(
    ConfigError, f"{BASE} in {{thing}}", "be the path of a config, or a list of some", "Correct it, or leave it out."
)
_LOOP = Refusal(ConfigError, f"{BASE} in {{thing}}", "lead to other configs, not back", "Take it out of one of them.")


class _UnreadableError(Exception):
    """A node that is refused: by which rule, what is there, and in which line."""

    def __init__(self, refusal: Refusal, got: str, node: Node) -> None:
        super().__init__(got)
        self.refusal, self.got, self.where = refusal, got, f"line {node.start_mark.line + 1}"


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no key twice in one section."""

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        node = super().compose_mapping_node(anchor)

        names = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and (key.tag, key.value) in names:
                raise _UnreadableError(_TWICE, f"{key.value!r} twice", key)
            names.add((key.tag, key.value) if isinstance(key, ScalarNode) else id(key))
        return node

    def refuse_tag(self, node: Node) -> Any:
        raise _UnreadableError(_TAG, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}", node)

    def compute_text(self, node: Node) -> Any:
        """The value of `!!python/object/apply:eval [text]`, as Detectron2's own configs have it; nothing is run."""
        match node:
            case SequenceNode(value=[ScalarNode(value=str() as text)]):
                with contextlib.suppress(ValueError):
                    return compute(text)
        return self.refuse_tag(node)


_Loader.add_constructor(None, _Loader.refuse_tag)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.compute_text)


def read_file(path: str, thing: str = "--config-file", behind: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file over those of its bases.

    Args:
        path: of a file, or an address that detectron2's PathManager knows.
        thing: who names it, for errors.
        behind: files that lead to it as their base.

    Raises:
        ConfigError: the file is missing, no YAML, needs code to be read, has a key twice, or its bases are such.
        LaunchError: this machine cannot read it.
    """
    where = f"{path}, a base of {behind[-1]}" if behind else path
    values = _parse(_read_bytes(path, thing, where), where)

    chain = (*behind, path)
    bases: dict[str, Any] = {}
    for base in _find_bases(values, path):
        if any(_is_same(base, file) for file in chain):
            raise _LOOP.of(" -> ".join((*chain, base)), thing=path)
        _lay_over(bases, read_file(base, f"{BASE} in {path}", chain), base)

    values.pop(BASE, None)
    return _lay_over(bases, values, path)


def read_bases(path: str) -> tuple[list[str], dict[str, Any]]:
    """The bases that a YAML file names, and their values without those of the file; see `read_file`."""
    paths = _find_bases(_parse(_read_bytes(path, "--config-file", path), path), path)
    values: dict[str, Any] = {}
    for base in paths:
        _lay_over(values, read_file(base, f"{BASE} in {path}", (path,)), base)
    return paths, values


def _read_bytes(path: str, thing: str, where: str) -> bytes:
    try:
        file = Path(PathManager.get_local_path(path) if "://" in path else path)
        kind = file.stat()
        if stat.S_ISDIR(kind.st_mode):
            raise _NO_FILE.of("a folder", where, thing=thing)
        if not stat.S_ISREG(kind.st_mode):  # a pipe would wait for ever, a device never end
            raise _NO_FILE.of("a device or a pipe", where, thing=thing)
        if kind.st_size > _MOST_BYTES:
            raise _NO_FILE.of(f"a file of {kind.st_size:,} bytes, which is no config", where, thing=thing)
        return file.read_bytes()

    except OSError as error:
        got = error.strerror or str(error)
        if "://" not in path and error.errno not in _OF_A_PATH:
            rule, remedy = "be on a disk that this machine can read", "Mend the disk, or copy the file."
            raise LaunchError.of(thing, rule, got=got, where=where, remedy=remedy) from error
        near = find_near_configs(path) if error.errno == errno.ENOENT else []
        if near:
            raise _NO_SUCH_FILE.of(got, where, thing=thing, near=" or ".join(near)) from error
        raise _NO_FILE.of(got, where, thing=thing) from error
    except (ConfigError, MemoryError):
        raise
    except (ValueError, AssertionError) as error:  # a path with a zero byte; an address that nobody serves
        raise _NO_FILE.of(str(error) or "an address that leads nowhere", where, thing=thing) from error


def _parse(text: bytes, where: str) -> dict[str, Any]:
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # which detectron2's log of the file cannot read
        raise _NO_YAML.of("text in UTF-16", thing=where, line="the encoding: save it as UTF-8")
    try:
        values = yaml.load(text, Loader=_Loader)
    except _UnreadableError as error:
        raise error.refusal.of(error.got, error.where, thing=where) from error
    except yaml.YAMLError as error:
        raise _refuse_text(error, where) from error
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever PyYAML raises for a value that its own tag does not fit, or for 1,000 brackets
        raise _NO_YAML.of(f"{type(error).__name__}: {error}", thing=where, line="the value") from error

    if not isinstance(values, dict):
        got = "an empty file" if values is None else f"no mapping of names to values but {type(values).__name__}"
        raise NO_KEYS.of(got, thing=where)
    _check_size(values, where)
    return values


def _refuse_text(error: yaml.YAMLError, where: str) -> Exception:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    line = f"line {mark.line + 1}" if mark else "the file"
    if "\\t" in problem:
        line += ": indent with spaces"
    return _NO_YAML.of(problem, f"line {mark.line + 1}" if mark else "", thing=where, line=line)


def _check_size(values: Any, where: str) -> None:
    """Refuse aliases that hold themselves, or that make a few lines millions of values."""
    number, waiting = 0, [values]
    while waiting:
        value = waiting.pop()
        number += 1
        if number > _MOST_VALUES:
            rule, got = f"have at most {_MOST_VALUES:,} values", "more, through aliases (& and *) perhaps"
            raise ConfigError.of(where, rule, got=got, remedy="Write the values out.")
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value


def _find_bases(values: Mapping[str, Any], path: str) -> list[str]:
    """Paths of the bases that a file names, which are relative to it, or names of configs of the package."""
    if BASE not in values:
        return []
    named = values[BASE]
    bases = named if isinstance(named, list) else [named]
    if not bases or not all(isinstance(base, str) and base for base in bases):
        raise _NO_BASE.of("null" if named is None else repr(named), thing=path)

    folder = os.path.dirname(path)
    paths = []
    for base in bases:
        paths.append(find_config_file(os.path.expanduser(base), folder))
    return paths


def _is_same(path: str, other: str) -> bool:
    return path == other or os.path.realpath(path) == os.path.realpath(other)


def _lay_over(below: dict[str, Any], above: Mapping[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    """Values over others, section by section; the lower ones are changed."""
    for key, value in above.items():
        is_section = isinstance(below.get(key), dict)
        if is_section and not isinstance(value, dict):
            raise NO_KEYS.of("null" if value is None else repr(value), path, thing=f"{prefix}{key}")
        if is_section:
            _lay_over(below[key], value, path, f"{prefix}{key}.")
        else:
            below[key] = value
    return below

"""Modules of the user's own that a command imports (`--import`): in the process that is started, and in its workers.

What they register when they are imported, data sets and architectures, is then known wherever it is asked for. Workers
are fresh processes and import them anew, before they are given anything.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from bnext.errors import ConfigError, Refusal, list_few
from bnext.text import suggest

__all__ = ["import_modules", "list_imported", "mentions"]

_imported: dict[str, ModuleType] = {}  # in this process, in their order

_NO_NAME = Refusal(
    ConfigError,
    "--import",
    "be a module, as `import` takes it, or the path of its file",
    "Write my_module, my_package.my_module, or folder/my_module.py.",
)
_NOT_FOUND = Refusal(ConfigError, "--import", "be a module that Python finds", "{remedy}")
_NO_FILE = Refusal(ConfigError, "--import", "be a file that exists, if it is a path", "{remedy}")
_OTHER = Refusal(
    ConfigError,
    "--import {name}",
    "be the module {path}",
    "Rename yours: another module of that name is imported already.",
)
_FAILED = Refusal(
    ConfigError,
    "--import {name}",
    "be a module that can be imported",
    "Correct it; `python -c 'import {name}'` shows more.",
)
_LACKING = Refusal(
    ConfigError,
    "--import {name}",
    "be a module whose own imports are found",
    "Install what it imports, or correct the name there; modules of yours are looked for in the folder in which the "
    "command is started, and in PYTHONPATH.",
)
_ENDED = Refusal(
    ConfigError,
    "--import {name}",
    "register what it has and return",
    "A call such as main() belongs under `if __name__ == '__main__':`, which an import passes over.",
)


def import_modules(names: Iterable[str]) -> None:
    """Import modules, in this order.

    Args:
        names: as `import` takes them, found in the working directory as well, or paths of their files.

    Raises:
        ConfigError: one cannot be imported; names the module, its file and line.

    Note:
        `sys.path` gets the working directory in front, as `python -m` has it, and the folder of a file that is named.
    """
    for given in names:
        name, path = _find_module(given)
        module = _import(name)
        _check_file(name, path, module)
        _imported[name] = module


def list_imported() -> tuple[str, ...]:
    """The names of the modules that this process has imported for its user."""
    return tuple(_imported)


def mentions(name: str, words: str) -> bool:
    """Whether the text of an imported module has these words."""
    file = getattr(_imported[name], "__file__", None)
    try:
        return file is not None and words in Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _find_module(given: str) -> tuple[str, Path | None]:
    """The name of a module, for which `sys.path` is made ready, and its file where that is known beforehand."""
    if given.endswith(".py") or os.sep in given:
        path = Path(os.path.abspath(os.path.expanduser(given)))
        return _name_file(given, path), path

    if not given or not all(part.isidentifier() for part in given.split(".")):
        raise _NO_NAME.of(repr(given))
    _put_in_front(Path.cwd())

    first = Path.cwd() / given.split(".")[0]
    for path in (first / "__init__.py", first.with_suffix(".py")):
        if path.is_file():
            return given, path if "." not in given else None
    return given, None


def _name_file(given: str, path: Path) -> str:
    """The name under which Python imports a file: that of its package, from the folder of the outermost one."""
    if not path.is_file():
        other = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        remedy = f"Did you mean {os.path.relpath(other)}?" if other.is_file() else "Correct the path."
        raise _NO_FILE.of(repr(given), str(path), remedy=remedy)

    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent

    name = ".".join(parts)
    if path.suffix != ".py" or not all(part.isidentifier() for part in parts):
        raise _NO_NAME.of(repr(given), "the file's name is no name of Python's")
    _put_in_front(folder)
    return name


def _put_in_front(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            near = suggest(name, _list_modules(), "Correct the name, or start the command in the module's folder.")
            where = f"looked for in {Path.cwd()} and in Python's path"
            raise _NOT_FOUND.of(repr(name), where, remedy=near) from error
        raise _LACKING.of(*_describe(name, error), name=name) from error

    except SyntaxError as error:
        got = f"{type(error).__name__}: {error.msg}"
        raise _FAILED.of(got, f"{error.filename}, line {error.lineno}", name=name) from error

    except SystemExit as error:
        _, where = _describe(name, error, first=True)
        raise _ENDED.of(f"the end of the program (exit status {error.code})", where, name=name) from error
    except Exception as error:  # whatever a user's code raises
        raise _FAILED.of(*_describe(name, error), name=name) from error


def _list_modules() -> list[str]:
    """Modules of the working directory, for the question which of them was meant."""
    files = [*Path.cwd().glob("*.py"), *(path.parent for path in Path.cwd().glob("*/__init__.py"))]
    return sorted(path.stem for path in files if path.stem.isidentifier())


def _describe(name: str, error: BaseException, *, first: bool = False) -> tuple[str, str]:
    """The error, and the last line (or the first) of the module's own, or of one beside it, on the way to it."""
    frames = _frames_of_user(traceback.extract_tb(error.__traceback__))
    text = " ".join(str(error).split())
    got = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if not frames:
        return got, name
    frame = frames[0 if first else -1]
    return got, f"{frame.filename}, line {frame.lineno}"


def _frames_of_user(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Frames after those of this file and of Python's import system, without those of installed packages."""
    start = max((place for place, frame in enumerate(frames) if frame.filename == __file__), default=-1)
    later = [frame for frame in frames[start + 1 :] if os.path.isfile(frame.filename)]
    users = [frame for frame in later if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    library = os.path.dirname(os.__file__)
    return [frame for frame in users if not frame.filename.startswith(library + os.sep)] or later


def _check_file(name: str, path: Path | None, module: ModuleType) -> None:
    """Refuse a folder without code, and a module of the same name as the user's, which was imported before."""
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):
        remedy = "Name a module in it, or give it an __init__.py that imports them."
        raise _NOT_FOUND.of(f"{name!r}, a folder without __init__.py", list_few(module.__path__), remedy=remedy)
    if path is None or (file is not None and os.path.realpath(file) == os.path.realpath(path)):
        return
    raise _OTHER.of(file or "a module of Python's own", name=name, path=path)

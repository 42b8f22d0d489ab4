"""A LazyConfig from its file: the file's code runs, and whatever it raises is one line that names file and line."""

from __future__ import annotations

import builtins
import os
import traceback
from collections.abc import Iterable, Sequence

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from bnext.errors import BNextError, ConfigError, Refusal
from bnext.lazy_config.calls import check_calls
from bnext.lazy_config.overrides import apply_overrides

__all__ = ["is_lazy_file", "read_lazy_file"]

_PACKAGE = "detectron2._cfg_loader"  # of the modules that detectron2 makes of config files
_NO_FILE = Refusal(ConfigError, "--config-file", "be a file", "Correct the path.")
_FAILS = Refusal(ConfigError, "The LazyConfig {file}", "be Python that runs", "{remedy}")


def is_lazy_file(path: str) -> bool:
    """Whether a path is of a LazyConfig, whose code runs when it is read."""
    return path.endswith(".py")


def read_lazy_file(
    path: str, overrides: Sequence[str] = (), checked: Iterable[str] = (), known: Iterable[str] = ()
) -> DictConfig:
    """The values of a LazyConfig file, with overrides.

    Args:
        path: of the file, whose code runs.
        overrides: words `key=value`.
        checked: top-level names whose calls are checked: targets that there are, arguments that they take.
        known: keys that an override may add, beside those that there are and the arguments of calls.

    Raises:
        ConfigError: there is no such file, it raises, an override has an unknown key, or a call cannot be made.
    """
    if not os.path.isfile(path):
        got = "a folder" if os.path.isdir(path) else "a path that leads nowhere"
        raise _NO_FILE.of(got, path)

    before = builtins.__import__
    try:
        config = LazyConfig.load(path)
    except BNextError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file raises
        raise _refuse(path, error) from error
    finally:
        builtins.__import__ = before  # which detectron2 leaves patched after an exception

    apply_overrides(config, overrides, path, known)
    check_calls(config, checked, path)
    return config


def _refuse(path: str, error: BaseException) -> BNextError:
    cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
    if isinstance(cause, SyntaxError) and cause.filename in (None, "<unknown>"):  # detectron2 parses text without name
        where = f"line {cause.lineno}"
    elif isinstance(cause, SyntaxError):
        where = f"{cause.filename}, line {cause.lineno}"
    else:
        where = _find_line(path, error)

    remedy = "Correct that line."
    if isinstance(error, ModuleNotFoundError):
        remedy = "Install the module, or name the folder that has it in PYTHONPATH."
    reason = getattr(cause, "msg", "") if isinstance(cause, SyntaxError) else str(cause)
    got = f"{type(cause).__name__}: {reason}" if reason else type(cause).__name__
    return _FAILS.of(got, where, file=path, remedy=remedy)


def _find_line(path: str, error: BaseException) -> str:
    """The place in a config file, or in one that it imports, from which the exception came."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__package__") or "")
        if package.startswith(_PACKAGE) and frame.f_globals.get("__file__"):
            file = frame.f_code.co_filename
            place = f"line {line}" if file == path else f"{file}, line {line}"
    return place

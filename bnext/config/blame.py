"""Whose fault an exception is: the config's, where detectron2 itself cannot build what it is told, or of the code."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from bnext.errors import BNextError, ConfigError, LaunchError

__all__ = ["building_from_config"]

_OF_DETECTRON2 = ("detectron2", "fvcore", "torch", "torchvision", "yacs")
_ITS_CALLERS = (*_OF_DETECTRON2, "bnext", "contextlib", "functools", "abc", "copy")


@contextlib.contextmanager
def building_from_config() -> Iterator[None]:
    """Turn what detectron2 raises for a config into a ConfigError, which names the function that refused it.

    What the system raises, such as OSError, and what passes through other people's code, such as an architecture,
    a mapper or a hook that somebody has registered, stays as it is: there the traceback is what helps.
    """
    try:
        yield
    except BNextError:
        raise
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][2:]  # below the `with`
        modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
        roots = [module.partition(".")[0] for module in modules]
        if not roots or roots[-1] not in _OF_DETECTRON2 or not set(roots) <= set(_ITS_CALLERS):
            raise

        reason = f"{type(error).__name__}: {error}"
        if "allocate" in reason or "out of memory" in reason:
            rule, remedy = "fit the memory of this machine", "Make the model or its sizes smaller."
            raise LaunchError.of("The model of the config", rule, got=reason, remedy=remedy) from error
        raise ConfigError.of(
            "The config",
            "describe a model and a schedule that detectron2 can build",
            got=reason,
            where=f"{modules[-1]}.{frames[-1].f_code.co_name}",
            remedy="Correct the key that it speaks of.",
        ) from error

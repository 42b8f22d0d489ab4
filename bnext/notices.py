"""Notices: said of the program's own accord, once for each thing that it is about."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

__all__ = ["HeldNotice", "gathering_notices", "holding_notices", "log_notices", "tell_once", "without_warnings"]

HeldNotice = tuple[str, int, str]  # logger, level, message

_SHOWN = 3  # names in a line
_Gathered = dict[tuple[logging.Logger, str], list[tuple[object, ...]]]  # logger and message -> arguments of each

_gathered: list[_Gathered] = []  # of the scopes that are open

_told_names: set[tuple[str, Hashable]] = set()
_told_objects: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def tell_once(logger: logging.Logger, thing: object, message: str, *args: object) -> None:
    """Log a warning unless the same was said of the same thing in this process.

    Args:
        logger: of the module that speaks.
        thing: a layer or another object, which is not kept alive; or a string or a tuple, which is compared by value.
        message: of logging's form, a whole sentence; "This is said once." follows it.
        args: for the message.

    Example:
        >>> tell_once(logging.getLogger("bnext"), "digits_val", "%s has crowds.", "digits_val")
        >>> tell_once(logging.getLogger("bnext"), "digits_val", "%s has crowds.", "digits_val")  # says nothing
    """
    if isinstance(thing, (str, tuple)):
        was_told = (message, thing) in _told_names
        _told_names.add((message, thing))
    else:
        messages = _told_objects.setdefault(thing, set())
        was_told = message in messages
        messages.add(message)

    if was_told:
        return
    if _gathered:
        _gathered[-1].setdefault((logger, message), []).append(args)
    else:
        logger.warning(f"{message} This is said once.", *args)


@contextlib.contextmanager
def gathering_notices() -> Iterator[None]:
    """Say the notices of the block at its end, the same message of several things in one line.

    Example:
        >>> log = logging.getLogger("bnext")
        >>> with gathering_notices():  # one line of norm1 that names the others
        ...     for name in ("norm1", "norm2", "norm3"):
        ...         tell_once(log, name, "%s saw one element.", name)
    """
    _gathered.append({})
    try:
        yield
    finally:
        for (logger, message), calls in _gathered.pop().items():
            others = _name_others(calls)
            logger.warning(f"{message}%s This is said once.", *calls[0], f" {others}" if others else "")


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Nothing up to warnings is logged in this scope, as somebody else says it better."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _name_others(calls: Sequence[tuple[object, ...]]) -> str:
    """The other things of which the first notice is said, by their first argument, in which they differ."""
    others = calls[1:]
    if not others:
        return ""
    names = [next((str(arg) for arg, first in zip(args, calls[0], strict=True) if arg != first), "") for args in others]
    if not all(names):
        return f"The same goes for {len(others)} more."
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"The same goes for {shown}{more}."


@contextlib.contextmanager
def holding_notices() -> Iterator[list[HeldNotice]]:
    """Keep back what bnext logs in the block, for `log_notices` to say where there is a file to log to.

    Yields:
        (logger, level, message) of each; picklable. After an exception they are said at once.
    """
    held: list[HeldNotice] = []
    handler = logging.Handler()
    handler.emit = lambda record: held.append((record.name, record.levelno, record.getMessage()))  # type: ignore[method-assign]

    logger = logging.getLogger("bnext")
    handlers, propagates = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    failed = True
    try:
        yield held
        failed = False
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        if failed:
            log_notices(held)


def log_notices(held: Iterable[HeldNotice]) -> None:
    """Say what `holding_notices` kept back."""
    for name, level, message in held:
        logging.getLogger(name).log(level, "%s", message)

"""Notices: said of the program's own accord, once for each thing that it is about."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterable, Iterator
from weakref import WeakKeyDictionary

__all__ = ["HeldNotice", "holding_notices", "log_notices", "tell_once"]

HeldNotice = tuple[str, int, str]  # logger, level, message

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

    if not was_told:
        logger.warning(f"{message} This is said once.", *args)


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

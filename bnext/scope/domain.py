"""The named domain(s) of the samples that are now in the network. No tensor, no module is known here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

from bnext.errors import DomainError

__all__ = ["get_active_domain", "use_domain"]

Active = str | tuple[str, ...] | None

_active: ContextVar[Active] = ContextVar("bnext_domain", default=None)
_entered: list[tuple[Active, object]] = []  # scopes of all threads, the latest last


@contextlib.contextmanager
def use_domain(domain: str | Sequence[str]) -> Iterator[None]:
    """Say of which domain the samples are that go through the network in this scope.

    Args:
        domain: its name; or one name per sample of the batch, in their order, for a mixed batch.

    Raises:
        DomainError: no name, or something that is none.

    Note:
        The innermost scope counts. A scope belongs to its thread. With activation checkpointing the
        backward pass runs the network again, on a GPU in another thread, and must lie in the scope, too.

    Example:
        >>> with use_domain("night"):
        ...     get_active_domain()
        'night'
    """
    names = (domain,) if isinstance(domain, str) else tuple(domain) if isinstance(domain, Iterable) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DomainError(
            f"domain must be a name, or one name per sample; got {domain!r} (use_domain). "
            f"Name the data set that the samples are from."
        )
    token = _active.set(domain if isinstance(domain, str) else names)
    entry = (_active.get(), token)
    _entered.append(entry)
    try:
        yield
    finally:
        _entered.remove(entry)
        _active.reset(token)


def get_active_domain(of_any_thread: bool = False) -> Active:
    """The domain of all samples, or that of each, or None outside of `use_domain`.

    Args:
        of_any_thread: where this thread is in no scope, take the latest of all threads.
    """
    own = _active.get()
    return _entered[-1][0] if own is None and of_any_thread and _entered else own

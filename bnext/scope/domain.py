"""The named domain(s) of the samples that are now in the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bnext.errors import DomainError, Refusal
from bnext.scope.record import Scope, get_record

__all__ = ["get_active_domain", "use_domain"]

NO_DOMAIN = Refusal(
    DomainError, "domain", "be a name, or one name per sample", "Name the data set that the samples are from."
)


def use_domain(domain: str | Sequence[str]) -> Scope:
    """Say of which domain the samples are that go through the network in this scope.

    Args:
        domain: its name; or one name per sample of the batch, in their order, for a mixed batch.

    Raises:
        DomainError: no name, or something that is none.

    Note:
        The innermost scope counts. A scope belongs to its thread. With activation checkpointing the backward pass runs
        the network again, in the domain of its own forward, wherever the backward pass lies. A compiled function that
        is checkpointed cannot know it: open the scope within the function.

    Example:
        >>> with use_domain("night"):
        ...     get_active_domain()
        'night'
    """
    names = (domain,) if isinstance(domain, str) else tuple(domain) if isinstance(domain, Iterable) else ()

    if not names or not all(isinstance(name, str) and name for name in names):
        raise NO_DOMAIN.of(repr(domain), "use_domain")
    return Scope(domain=domain if isinstance(domain, str) else names)


def get_active_domain() -> str | tuple[str, ...] | None:
    """The domain of all samples, or that of each, or None outside of `use_domain`."""
    return get_record().domain

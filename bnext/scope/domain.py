"""The named domain(s) of the samples that are now in the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from bnext.errors import DomainError, Refusal
from bnext.scope.record import Scope, get_record

__all__ = ["find_domains_of_batch", "get_active_domain", "naming_domains", "use_domain"]

NO_DOMAIN = Refusal(
    DomainError, "domain", "be a name, or one name per sample", "Name the data set that the samples are from."
)


def use_domain(domain: str | Sequence[str]) -> Scope:
    """Say of which domain the samples are that go through the network in this scope.

    Args:
        domain: its name; or one name per sample of the batch, in their order, for a mixed batch.

    Raises:
        DomainError: no name, or something that is none; or names without an order.

    Note:
        The innermost scope counts. A scope belongs to its thread. With activation checkpointing the backward pass runs
        the network again, in the domain of its own forward, wherever the backward pass lies. A compiled function that
        is checkpointed cannot know it: open the scope within the function.

    Example:
        >>> with use_domain("night"):
        ...     get_active_domain()
        'night'
    """
    is_ordered = isinstance(domain, Iterable) and not isinstance(domain, (Set, Mapping))
    names = (domain,) if isinstance(domain, str) else tuple(domain) if is_ordered else ()

    if not names or not all(isinstance(name, str) and name for name in names):
        raise NO_DOMAIN.of(repr(domain), "use_domain")
    return Scope(domain=domain if isinstance(domain, str) else names)


def get_active_domain() -> str | tuple[str, ...] | None:
    """The domain of all samples, or that of each, or None outside of `use_domain`."""
    return get_record().domain


def find_domains_of_batch(batch: Any) -> str | tuple[str, ...] | None:
    """The domain that the records of a batch say: of all, or of each image; "" for one that says none.

    Args:
        batch: a list of mappings with or without "domain", as the loaders of Detectron2 give them.

    Returns:
        None: no record has a domain, the batch is no list of records, or a scope of `use_domain`, which comes first, is
        open.

    Example:
        >>> find_domains_of_batch([{"domain": "day"}, {"domain": "night"}])
        ('day', 'night')
    """
    is_list = isinstance(batch, (list, tuple)) and all(isinstance(record, Mapping) for record in batch)
    if not is_list or get_active_domain() is not None:
        return None

    given = [record.get("domain") for record in batch]
    names = tuple("" if name is None else str(name) for name in given)
    if not any(names):
        return None
    return names[0] if len(set(names)) == 1 else names


def naming_domains(batch: Any) -> AbstractContextManager[None]:
    """The scope of the domains that the records of a batch say, for a forward that does not begin at the model.

    Args:
        batch: see `find_domains_of_batch`; where that gives None nothing changes.
    """
    names = find_domains_of_batch(batch)
    return nullcontext() if names is None else Scope(domain=names)

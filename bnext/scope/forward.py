"""The level of a call: named by whoever calls the head, or counted within one forward of a model.

A head of others applies a norm to one level after the other and cannot name them. Then the calls of one forward are
counted, in the call's record: they begin anew with each forward, whatever became of the one before, and are looked at
when it ends. What a norm expects of them is its own matter: `bnext.layers.cycle_batch_norm`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnext.errors import ConfigError, Refusal
from bnext.scope.record import Scope, close_scopes, get_record

__all__ = ["Entry", "ForwardCalls", "count_levels", "use_level"]

Size = tuple[int, ...]

NO_LEVEL = Refusal(ConfigError, "level", "be a name", "Name the level of the features, such as use_level('p3').")
NO_ENTRY = Refusal(
    ConfigError,
    "entry",
    "name methods of the model or of its modules, such as 'forward', 'inference' or 'head'",
    "Name what is called from outside, once for each forward.",
)


def use_level(level: str) -> Scope:
    """Say of which level the features are that go through a head in this scope.

    For heads that apply their norms to one level after the other and know the names: `CycleBatchNormList` then counts
    nothing, and a level may be left out.

    Args:
        level: its name, as the norms have it.

    Raises:
        ConfigError: no name.

    Example:
        >>> with use_level("p3"):
        ...     get_record().level
        'p3'
    """
    if not isinstance(level, str) or not level:
        raise NO_LEVEL.of(repr(level), "use_level")
    return Scope(level=level)


class ForwardCalls:
    """Calls of norms within one forward, of levels that nobody has named.

    Attributes:
        sizes: norm -> [H, W] of the features of each call so far, in their order.
        depth: entries within one another that are open.
        is_kept: whether all running statistics that moved can be put back.
    """

    def __init__(self) -> None:
        self.sizes: dict[nn.Module, list[Size]] = {}
        self.depth = 0
        self.is_kept = True
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, norm: nn.Module, feature: Tensor) -> None:
        """Count a call of a norm with [N, C, H, W]."""
        self.sizes.setdefault(norm, []).append(tuple(feature.shape[2:]))

    def keep(self, state: nn.Module) -> None:
        """Remember running statistics that are about to move."""
        self._kept += [(buffer, buffer.clone()) for buffer in state.buffers(recurse=False)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what the calls of this forward have moved, as they were of other levels than was thought."""
        for buffer, value in reversed(self._kept):
            buffer.data.copy_(value)
        self._kept = []


class Entry:
    """A method of a module with which a forward begins; it takes the method's place on that module.

    Args:
        module: that has it.
        name: of the method.
        own: what the module has in the place of its class' method; None: nothing.
    """

    def __init__(self, module: nn.Module, name: str, own: Any = None) -> None:
        self.module, self.name, self.own = module, name, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _counting(self.module):
            if self.own is not None:
                return self.own(*args, **kwargs)
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class CountedLevels:
    """Entries of a model that `count_levels` has added; `remove()` takes them away again."""

    def __init__(self) -> None:
        self._undo: list[Any] = []

    def add_forward(self, module: nn.Module) -> None:
        if _begin in module._forward_pre_hooks.values():
            return
        self._undo += [
            module.register_forward_pre_hook(_begin).remove,
            module.register_forward_hook(_check).remove,
            module.register_forward_hook(_end, always_call=True).remove,
        ]

    def add_method(self, module: nn.Module, name: str) -> None:
        own = vars(module).get(name)
        if isinstance(own, Entry):
            return
        setattr(module, name, Entry(module, name, own))
        self._undo.append(partial(delattr, module, name) if own is None else partial(setattr, module, name, own))

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def count_levels(model: nn.Module, entry: str | Sequence[str] = "forward") -> CountedLevels:
    """Count the calls of a model's `CycleBatchNormList`s anew with every forward of it. In place.

    `bnext.repair` has it done. A model whose head was built with these norms needs it once, before its first forward.

    Args:
        model: whose forward calls each norm once for every level, in their order.
        entry: what is called from outside: "forward", the model itself; another method, as "inference" of
            detectron2's detectors; a module of it, as "head"; or several of them. Of entries within one another the
            outermost counts.

    Returns:
        What can be taken away again: `.remove()`.

    Raises:
        ConfigError: the model has not what is named.

    Note:
        Goes with the model into its copies and pickles; state dicts do not know of it. Calling it twice changes
        nothing.

    Example:
        >>> handle = count_levels(nn.Sequential(nn.Conv2d(3, 8, 1)))
        >>> handle.remove()
    """
    names = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, Iterable) else ()
    places = [_find_place(model, name) for name in names]
    if not places:
        raise NO_ENTRY.of(repr(entry), "count_levels")

    counted = CountedLevels()
    for module, method in places:
        if method == "forward":
            counted.add_forward(module)
        else:
            counted.add_method(module, method)
    return counted


def _find_place(model: nn.Module, name: object) -> tuple[nn.Module, str]:
    """A module and the name of its method, from "head", "inference" or "head.forward"."""
    if isinstance(name, str) and name:
        owner, _, last = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            module = model.get_submodule(owner)
            if isinstance(getattr(module, last, None), nn.Module):
                return module.get_submodule(last), "forward"
            if callable(getattr(module, last, None)):
                return module, last
    raise NO_ENTRY.of(repr(name), type(model).__name__)


# ---- one forward


def _list_counting(module: nn.Module) -> list[nn.Module]:
    """Norms in a module whose calls are counted, or looked at by somebody for a while."""
    observed = get_record().observed
    return [part for part in module.modules() if getattr(part, "counts_calls", False) or part in observed]


def _list_open(module: nn.Module) -> list[ForwardCalls]:
    """The forwards in which norms of a module are."""
    calls = get_record().calls
    return list(dict.fromkeys(calls[norm] for norm in _list_counting(module) if norm in calls))


def _find_new(module: nn.Module) -> dict[nn.Module, ForwardCalls]:
    """The norms of a module that are in no forward yet, each with the one that begins."""
    open_calls, calls = get_record().calls, ForwardCalls()
    return {norm: calls for norm in _list_counting(module) if norm not in open_calls}


def _begin(module: nn.Module, args: Any) -> None:
    new = _find_new(module)
    if new:
        Scope(module, calls=new).__enter__()
    for calls in _list_open(module):
        calls.depth += 1


def _check(module: nn.Module, args: Any, output: Any) -> None:
    """Look at the calls of a forward that has come to its end; after an exception nobody does."""
    calls = get_record().calls
    for norm in _list_counting(module):
        check: Any = getattr(norm, "check_calls", None)
        if check is not None and norm in calls and calls[norm].depth == 1:
            check(calls[norm])


def _end(module: nn.Module, args: Any, output: Any) -> None:
    for calls in _list_open(module):
        calls.depth -= 1
    close_scopes(module)


@contextlib.contextmanager
def _counting(module: nn.Module) -> Iterator[None]:
    """The same for a call that is not the module's own, and so has no hooks."""
    new = _find_new(module)
    with Scope(calls=new) if new else contextlib.nullcontext():
        forwards = _list_open(module)
        for calls in forwards:
            calls.depth += 1
        try:
            yield
            _check(module, None, None)
        finally:
            for calls in forwards:
                calls.depth -= 1

"""Progress bars for what may take more than ten seconds: on terminals alone, with the lines of a log above them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TextIO, TypeVar

from tqdm import tqdm

__all__ = ["AboveBars", "Tracked", "is_terminal", "showing_progress", "track"]

Thing = TypeVar("Thing")

_DELAY = 2.0  # seconds without a bar: what is done by then needs none
_open: list[Any] = []  # bars on the screen


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may look at a stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


@contextlib.contextmanager
def showing_progress(
    words: str,
    total: int | None = None,
    unit: str = "it",
    *,
    is_wanted: bool = True,
    stream: TextIO | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A bar within the block; off a terminal it counts and shows nothing.

    Args:
        words: for what is done.
        total: number of steps; None: not known.
        unit: of a step.
        is_wanted: whether this worker shows it.
        stream: where; None: the standard error stream, if it is a terminal.
        options: of `tqdm`: a bar stays when it is done with leave=True, and comes at once with delay=0.

    Yields:
        The bar, whose `update` counts.
    """
    is_shown = is_wanted and (stream is not None or is_terminal(sys.stderr))
    options = {"delay": _DELAY, "leave": False, **options}

    with tqdm(
        total=total,
        desc=words,
        unit=unit,
        file=stream or sys.stderr,
        dynamic_ncols=True,
        disable=not is_shown,
        **options,
    ) as bar:
        if not is_shown:
            yield bar
            return

        _open.append(bar)
        try:
            yield bar
        finally:
            _open.remove(bar)


def track(
    things: Iterable[Thing], words: str, total: int | None = None, unit: str = "it", *, is_wanted: bool = True
) -> Iterator[Thing]:
    """Things one by one, with a bar; see `showing_progress`.

    Example:
        >>> list(track([1, 2, 3], "counting"))
        [1, 2, 3]
    """
    if total is None and isinstance(things, Sized):
        total = len(things)
    with showing_progress(words, total, unit, is_wanted=is_wanted) as bar:
        for thing in things:
            yield thing
            bar.update()


class Tracked(Generic[Thing]):
    """A loader whose batches are counted by a bar; see `track`."""

    def __init__(self, loader: Any, words: str, unit: str = "it", *, is_wanted: bool = True) -> None:
        self._loader, self._words, self._unit, self._is_wanted = loader, words, unit, is_wanted

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Thing]:
        return track(self._loader, self._words, len(self._loader), self._unit, is_wanted=self._is_wanted)


class AboveBars:
    """A stream whose text comes above the bars that are open.

    Args:
        stream: of the log's lines. tqdm's own redirection knows the present sys.stdout only.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if not _open:
            self.stream.write(text)
            return

        with tqdm.get_lock():
            shown = [bar for bar in _open if time.time() >= bar.start_t + bar.delay]
            for bar in shown:
                bar.clear(nolock=True)
            self.stream.write(text)
            self.stream.flush()
            for bar in shown:
                bar.refresh(nolock=True)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return is_terminal(self.stream)

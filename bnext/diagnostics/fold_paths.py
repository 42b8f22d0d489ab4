"""Paths that differ in numbers alone, written as one: `res2.{0-2}.conv{1-3}.norm`."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["fold_paths"]

_NUMBER = re.compile(r"^(.*?)(0|[1-9]\d*)(\D*)$")

# A part of a path: what stands before its last number, the numbers (none: it has no number), and what stands after.
_Part = tuple[str, frozenset[int], str]
_Pattern = tuple[_Part, ...]


def fold_paths(paths: Iterable[str]) -> dict[str, list[str]]:
    """Pattern -> the paths that it stands for, exactly these, in their order.

    Args:
        paths: with dots between their parts.

    Example:
        >>> fold_paths(["res2.0.conv1", "res2.0.conv2", "res2.0.shortcut", "res2.1.conv1", "res2.1.conv2"])
        {'res2.{0-1}.conv{1-2}': ['res2.0.conv1', 'res2.0.conv2', 'res2.1.conv1', 'res2.1.conv2'], \
'res2.0.shortcut': ['res2.0.shortcut']}
    """
    patterns: dict[_Pattern, list[str]] = {}
    for path in dict.fromkeys(paths):
        patterns[tuple(_read_part(part) for part in path.split("."))] = [path]

    depth = max((len(pattern) for pattern in patterns), default=0)
    for place in reversed(range(depth)):
        patterns = _merge(patterns, place)

    order = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    folded = {}
    for pattern, members in patterns.items():
        folded[".".join(map(_write_part, pattern))] = sorted(members, key=order.__getitem__)
    return dict(sorted(folded.items(), key=lambda item: order[item[1][0]]))


def _read_part(part: str) -> _Part:
    match = _NUMBER.match(part)
    if match is None:
        return part, frozenset(), ""
    return match[1], frozenset([int(match[2])]), match[3]


def _merge(patterns: dict[_Pattern, list[str]], place: int) -> dict[_Pattern, list[str]]:
    """Join patterns that differ in the numbers at one place alone: their union stands for the same paths."""
    unions: dict[tuple[object, ...], tuple[_Pattern, set[int], list[str]]] = {}
    for pattern, members in patterns.items():
        has_number = place < len(pattern) and bool(pattern[place][1])
        key: tuple[object, ...] = pattern
        if has_number:
            before, _, after = pattern[place]
            key = (*pattern[:place], (before, after), *pattern[place + 1 :])

        _, numbers, of_union = unions.setdefault(key, (pattern, set(), []))
        of_union += members
        if has_number:
            numbers |= pattern[place][1]

    merged: dict[_Pattern, list[str]] = {}
    for pattern, numbers, members in unions.values():
        if numbers:
            before, _, after = pattern[place]
            pattern = (*pattern[:place], (before, frozenset(numbers), after), *pattern[place + 1 :])
        merged[pattern] = members
    return merged


def _write_part(part: _Part) -> str:
    before, numbers, after = part
    if len(numbers) < 2:
        return f"{before}{min(numbers, default='')}{after}"

    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])

    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{before}{{{','.join(words)}}}{after}"

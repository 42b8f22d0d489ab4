"""Text from outside, such as names of data sets, paths and values, as it may be printed, written and drawn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from urllib.parse import quote

__all__ = ["escape_math", "find_near", "flatten_text", "name_folder", "suggest"]


def flatten_text(text: str, most: int | None = None) -> str:
    """A text on one line, which no terminal takes for commands: what cannot be printed is written as Python does.

    Args:
        text: of a user, a file or another library.
        most: characters that are left; None: all.

    Example:
        >>> flatten_text("two\\nlines, a bell \\x07")
        'two\\\\nlines, a bell \\\\x07'
        >>> flatten_text("0123456789", most=4)
        '0123 ...'
    """
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: most or len(text)])
    return shown if most is None or len(text) <= most else f"{shown} ..."


def escape_math(text: str) -> str:
    """A text as matplotlib draws it letter by letter: between dollar signs it would see formulas.

    Example:
        >>> print(escape_math("price_$"))
        price_\\$
    """
    return text.replace("$", r"\$")


def name_folder(text: str) -> str:
    """A text as the name of one folder, which leads to no other place.

    Example:
        >>> name_folder("../night_val")
        '..%2Fnight_val'
        >>> name_folder("..")
        '%2E%2E'
    """
    letters = [letter if letter.isprintable() and letter not in "%/\\" else quote(letter, "") for letter in text]
    name = "".join(letters)
    return name if name.strip(".") else name.replace(".", "%2E")


def find_near(name: object, known: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """The names that may have been meant: first those that differ in case, dots, dashes and underscores alone.

    Args:
        name: as somebody wrote it.
        known: the names that there are.
        most: of them.
        cutoff: 0 to 1; how alike two names must be.

    Example:
        >>> find_near("sync_bn", ["BN", "SyncBN", "GN"])
        ['SyncBN']
    """
    plain: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(known):
        plain.setdefault(_strip(candidate), []).append(candidate)

    wanted = _strip(str(name)[:200])
    if plain.get(wanted):
        return plain[wanted][:most]

    near: list[str] = []
    for match in difflib.get_close_matches(wanted, plain, n=most, cutoff=cutoff):
        near += plain[match]
    return near[:most]


def _strip(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def suggest(name: object, known: Iterable[str], otherwise: str = "Choose one of them.", most: int = 3) -> str:
    """The remedy for a name that is not known: a question for the nearest ones.

    Args:
        name: as somebody wrote it.
        known: the names that there are.
        otherwise: where none is near.
        most: names in the question.

    Example:
        >>> suggest("shard", ["shared", "per_level"])
        "Did you mean 'shared'?"
    """
    near = find_near(name, known, most)
    return f"Did you mean {' or '.join(repr(match) for match in near)}?" if near else otherwise

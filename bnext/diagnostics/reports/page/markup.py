"""Pieces of the page's HTML: everything from outside is escaped here."""

from __future__ import annotations

import re
from html import escape

from bnext.text import flatten_text

__all__ = ["count_of", "draw_sign", "write_chip", "write_markdown", "write_name", "write_paste"]

# A sign for each state beside its colour: a cross, an exclamation mark, an i, a tick.
_SIGNS = {
    "error": '<circle cx="12" cy="12" r="11"/><path d="M8 8l8 8M16 8l-8 8"/>',
    "warning": '<polygon points="12,1 23.5,22 .5,22"/><path d="M12 9v6M12 18.6v.1"/>',
    "note": '<rect x="1" y="1" width="22" height="22" rx="6"/><path d="M12 11v6M12 7v.1"/>',
    "healthy": '<circle cx="12" cy="12" r="11"/><path d="M7 12.5l3.5 3.5L17 9"/>',
}


def draw_sign(severity: str) -> str:
    """The sign of a severity, or of health."""
    return f'<svg class="sign {severity}" viewBox="0 0 24 24" aria-hidden="true">{_SIGNS[severity]}</svg>'


def write_name(text: str) -> str:
    """A name from outside as markup: on one line, nothing in it is taken for a tag."""
    return escape(flatten_text(text))


def write_markdown(text: str) -> str:
    """Text with `code` and **stress**; line ends are spaces."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", write_name(" ".join(text.splitlines())))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)


def write_chip(name: str, value: str) -> str:
    """A small label; the name is ours, the value may be from outside."""
    return f'<span class="chip">{name} <b>{write_name(value)}</b></span>'


def write_paste(title: str, text: str) -> str:
    """A block of text to paste, to which the script gives a button; nothing for no text."""
    if not text:
        return ""
    return f'<figure class="paste"><figcaption>{title}</figcaption><pre>{escape(text)}</pre></figure>'


def count_of(number: int, word: str, words: str = "") -> str:
    """A number of things.

    Example:
        >>> count_of(1, "norm"), count_of(2000, "batch", "batches")
        ('1 norm', '2,000 batches')
    """
    return f"{number:,} {word if number == 1 else words or f'{word}s'}"

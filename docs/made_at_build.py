"""Parts of the pages that are made at build from the code: keys, options of commands, the API, the notebook.

A page says where with `<!-- made at build: PART ARGUMENT -->`; `PARTS` has a function for each, which gives Markdown. Keys
that stand in a text as code are linked to their entry.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import bnext
from bnext.config.keys import KEYS, PLACE_KEYS, Key, Need, Values
from bnext.config.places import PLACES

_MARK = re.compile(r"^<!-- made at build: (\w+) ?([\w.]*) -->$", flags=re.MULTILINE)
_FULLEST = "ROI_BOX_HEAD"  # a place that has all keys of places
_PLACE_KEYS = {key.name: key for keys in PLACE_KEYS.values() for key in keys}


def _code(words: str) -> str:
    """Words of the table of keys with its quoted values as code."""
    return re.sub(r"'([\w.]*)'", r"`\1`", words)


# ---- keys


def make_place_keys(_: str) -> str:
    """Every key that places have."""
    rows = [*PLACE_KEYS[_FULLEST], next(key for key in _PLACE_KEYS.values() if key.name.endswith(".NORM"))]
    return "\n\n".join(_make_key(key, f"MODEL.BNEXT.PLACE.{key.name.split('.')[-1]}", []) for key in rows)


def make_places(_: str) -> str:
    """Every place, the key of its norm, and whose its statistics may be."""
    rows = ["| place | norm | whose statistics |", "|---|---|---|"]
    for name, place in PLACES.items():
        sources = ", ".join(f"`{source}`" for source in place.sources)
        rows.append(f"| `MODEL.BNEXT.{name}` | `{place.norm}` | {sources} |")
    return "\n".join(rows)


def make_other_keys(_: str) -> str:
    """Every key that is not of a place, by its node."""
    groups: dict[str, list[Key]] = {}
    for key in KEYS.values():
        if key.name not in _PLACE_KEYS:
            groups.setdefault(_name_group(key.name), []).append(key)

    parts = []
    for group in sorted(groups):
        entries = [_make_key(key, key.name, key.needs) for key in groups[group]]
        parts.append("\n\n".join([f"## {group}", *entries]))
    return "\n\n".join(parts)


def _name_group(name: str) -> str:
    """`SOLVER.BNEXT` of SOLVER.BNEXT.FREEZE.ITER, `SOLVER` of a key beside it."""
    return ".".join(name.split(".")[:2]) if ".BNEXT." in name else name.split(".")[0]


def _make_key(key: Key, name: str, needs: Sequence[Need]) -> str:
    lines = [f":::{{confval}} {name}", f":default: `{key.default!r}`", "", f"{key.help[:1].upper()}{key.help[1:]}."]
    if key.values:
        lines += ["", f"Must be {_code(key.values.words)}."]
    lines += [f"\n{_describe(need)}" for need in needs]
    return "\n".join([*lines, ":::"])


def _describe(need: Need) -> str:
    conditions = " or ".join(f"`{name}` {_words(values)}" for name, values in need.conditions.items())
    of = f" (as {_code(need.of.words)})" if need.of else ""
    reason = f": {_code(need.reason)}" if need.reason else ""
    otherwise = "; otherwise it is left out, which is said" if need.is_said else ""
    return f"Needs{of} {conditions}{otherwise}{reason}."


def _words(values: Values) -> str:
    return f"to be {_code(values.words)}"


# ---- the API


def make_names(module: str) -> str:
    """Every public name of a module, documented by its docstring; those of `bnext` itself are in its own list alone."""
    room = importlib.import_module(module)
    names = [name for name in room.__all__ if module == "bnext" or name not in bnext.__all__]

    lines = ["```{eval-rst}"]
    for name in sorted(names, key=lambda name: (_rank(getattr(room, name)), name.lower())):
        lines += [f".. {_choose_directive(getattr(room, name))}:: {module}.{name}", ""]
    return "\n".join([*lines, "```"])


def _rank(value: Any) -> int:
    """Functions and classes first, then errors, then the rest."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return 1
    return 0 if callable(value) else 2


def _choose_directive(value: Any) -> str:
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    if inspect.ismodule(value):
        return "automodule"
    return "autofunction" if callable(value) else "autodata"  # data: with `:no-value:`


def write_as_rest(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """A docstring of ours as reStructuredText: code stands between two backticks, and a formula keeps its lines."""
    text = "\n".join(lines)
    text = re.sub(r"(?<![`:\\])`([^`\n]+)`(?!`)(?=(\w?))", _quote, text)
    text = re.sub(r"\|(\w+)\|", r"\\|\1\\|", text)  # an absolute value, not a substitution
    formula = re.compile(r"(\A|\n)(\S[^\n]*[^:\n])\n\n((?: {4}[^\n]*\n)+)(?=\n|\Z)")
    text = formula.sub(r"\1\2\n\n::\n\n\3", f"{text}\n")
    lines[:] = text.split("\n")


def _quote(match: re.Match[str]) -> str:
    return f"``{match[1]}``" + ("\\ " if match[2] else "")


# ---- the parts, and the links of keys

PARTS: dict[str, Callable[[str], str]] = {
    "place_keys": make_place_keys,
    "places": make_places,
    "other_keys": make_other_keys,
    "names": make_names,
}


def fill_page(app: Sphinx, page: str, source: list[str]) -> None:
    """A page with its parts in place of the marks."""
    source[0] = _MARK.sub(lambda match: PARTS[match[1]](match[2]), source[0])


def link_keys(app: Sphinx, doctree: nodes.document) -> None:
    """Code that begins with a key of bnext becomes a link to the key's entry."""
    for literal in list(doctree.findall(nodes.literal)):
        words = literal.astext().split()
        if not words or words[0] not in KEYS or _is_within(literal, (nodes.reference, nodes.title)):
            continue
        target = words[0]
        if target in _PLACE_KEYS:
            target = f"MODEL.BNEXT.PLACE.{target.split('.')[-1]}"

        link = addnodes.pending_xref("", refdomain="std", reftype="confval", reftarget=target, refwarn=True)
        link["refdoc"] = app.env.current_document.docname
        literal.replace_self(link)
        link += literal


def _is_within(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    parents: Iterable[nodes.Node] = _find_parents(node)
    return any(isinstance(parent, (*kinds, addnodes.pending_xref, addnodes.desc_signature)) for parent in parents)


def _find_parents(node: nodes.Node) -> list[nodes.Node]:
    parents = []
    while node.parent is not None:
        node = node.parent
        parents.append(node)
    return parents


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", fill_page)
    app.connect("doctree-read", link_keys)
    app.connect("autodoc-process-docstring", write_as_rest, priority=100)  # before napoleon's
    return {"parallel_read_safe": True}

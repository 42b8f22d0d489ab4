"""Parts of the pages that are made at build: keys, commands, checks, the API, tables of studies, the notebook.

A page says where with `<!-- made at build: PART ARGUMENT -->`; `PARTS` has a function for each, which gives Markdown.
Keys and codes of the doctor that stand in a text as code are linked to their entry.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from evidence import show_exhibit
from notebook_cells import format_page
from sphinx import addnodes
from sphinx.application import Sphinx

import bnext
from bnext.cli.main import COMMANDS, build_parser
from bnext.config import load_config
from bnext.config.keys import KEYS, PLACE_KEYS, Key, Need
from bnext.config.places import PLACES
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.diagnostics.findings import Check
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_json import read_schema
from bnext.diagnostics.reports.report_text import DEEPER
from bnext.evaluation.doctor import examine_detector

_MARK = re.compile(r"^<!-- made at build: (\w+) ?([\w./-]*) -->$", flags=re.MULTILINE)
_NO_LINK_IN = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)
_PLACE_KEYS = {key.name: key for keys in PLACE_KEYS.values() for key in keys}


def _code(words: str) -> str:
    """Words of the table of keys with its quoted values as code."""
    return re.sub(r"'([\w.]*)'", r"`\1`", words)


# ---- keys


def make_place_keys(_: str) -> str:
    """Every key that places have."""
    rows = {}
    for place, keys in PLACE_KEYS.items():
        for key in keys:
            rows.setdefault(key.name.split(".")[-1], {})[place] = key

    return "\n\n".join(_make_place_key(name, keys) for name, keys in rows.items())


def _make_place_key(name: str, keys: Mapping[str, Key]) -> str:
    """A key of places, with what differs between them."""
    answers: dict[str, list[str]] = {}
    for place, key in keys.items():
        answers.setdefault(_describe_values(key), []).append(place)

    first = next(iter(keys.values()))
    lines = [f":::{{confval}} MODEL.BNEXT.PLACE.{name}", _make_sentence(first.help)]
    for answer, places in answers.items():
        prefix = f"{', '.join(f'`{place}`' for place in places)}: " if len(answers) > 1 else ""
        lines += ["", f"{prefix}{answer}"]
    return "\n".join([*lines, ":::"])


def make_places(_: str) -> str:
    """Every place, the key of its norm, and whose its statistics may be."""
    rows = ["| place | norm | whose statistics |", "|---|---|---|"]
    for name, place in PLACES.items():
        answers = ", ".join(f"`{answer}`" for answer in place.answers)
        rows.append(f"| `MODEL.BNEXT.{name}` | `{place.norm}` | {answers} |")
    return "\n".join(rows)


def make_other_keys(_: str) -> str:
    """Every key that is not of a place, by its node."""
    groups: dict[str, list[Key]] = {}
    for key in KEYS.values():
        if key.name not in _PLACE_KEYS:
            groups.setdefault(_name_group(key.name), []).append(key)

    parts = []
    for group in sorted(groups):
        entries = [_make_key(key) for key in groups[group]]
        parts.append("\n\n".join([f"## {group}", *entries]))
    return "\n\n".join(parts)


def _name_group(name: str) -> str:
    """`SOLVER.BNEXT` of SOLVER.BNEXT.FREEZE.ITER, `SOLVER` of a key beside it."""
    return ".".join(name.split(".")[:2]) if ".BNEXT." in name else name.split(".")[0]


def _make_key(key: Key) -> str:
    needs = [f"\n{_describe(need)}" for need in key.needs]
    return "\n".join([f":::{{confval}} {key.name}", _make_sentence(key.help), "", _describe_values(key), *needs, ":::"])


def _make_sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _describe_values(key: Key) -> str:
    default = f"Default `{key.default!r}`."
    return f"{default} Must be {_code(key.values.words)}." if key.values else default


def _describe(need: Need) -> str:
    conditions = " or ".join(f"`{name}` to be {_code(values.words)}" for name, values in need.conditions.items())
    of = f" (as {_code(need.of.words)})" if need.of else ""
    reason = f": {_code(need.reason)}" if need.reason else ""
    otherwise = "; otherwise it is left out, which is said" if need.is_said else ""
    return f"Needs{of} {conditions}{otherwise}{reason}."


# ---- commands


def make_commands(_: str) -> str:
    """Every command: what it does, its usage, and every option of its parser."""
    rows = ["| command | |", "|---|---|"]
    rows += [f"| [`bnext {name}`](#bnext-{name}) | {summary} |" for name, (_, summary) in COMMANDS.items()]
    return "\n\n".join(["\n".join(rows), *map(_make_command, COMMANDS)])


def _make_command(name: str) -> str:
    command = importlib.import_module(COMMANDS[name][0])
    parts = [f"## bnext {name}", f":::{{program}} bnext {name}\n:::", _format_description(command.DESCRIPTION)]
    # One that needs nothing but Python parses by itself.
    actions = build_parser(name, f"bnext {name}")._actions if hasattr(command, "add_arguments") else []
    for action in actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        parts.append(_make_option(action))
    return "\n\n".join(parts)


def _format_description(text: str) -> str:
    """The paragraphs of a help text; those that are indented are commands, or lists."""
    parts = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        if paragraph.startswith(" "):
            language = "sh" if "bnext" in paragraph else "text"
            parts.append(f"```{language}\n{textwrap.dedent(paragraph)}\n```")
        else:
            parts.append(re.sub(r"(?<![\w`])(--[\w-]+)", r"`\1`", paragraph))
    return "\n\n".join(parts)


def _make_option(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    if not value and action.nargs != 0:
        value = action.dest.upper()
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.nargs in ("+", "*", argparse.REMAINDER):
        value += " ..."

    help_text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    names = ", ".join(f"{option} {value}".strip() for option in action.option_strings)
    required = " (required)" if action.required and action.option_strings else ""
    if help_text[:1].isalpha() and "://" not in help_text.split()[0]:
        help_text = f"{help_text[0].upper()}{help_text[1:]}"
    if not action.option_strings:
        return f"`{value}`\n: {help_text}."
    return f":::{{option}} {names}\n{help_text}{required}.\n:::"


# ---- the doctor


def make_diagnosis(config: str) -> str:
    """What the doctor says of a config of the package, and the command that prints it."""
    cfg = load_config(config)
    facts, _ = examine_detector(cfg, Origin("config", config, weights=cfg.MODEL.WEIGHTS))
    return f"```text\n$ bnext doctor --config-file {config}\n{examine_facts(facts)}\n```"


def make_checks(_: str) -> str:
    """Every check of the doctor: the fault, why it is one, its cost, and the symptoms that name it."""
    checks = find_checks()
    rows = ["| code | the fault | seen with |", "|---|---|---|"]
    for code, check in checks.items():
        rows.append(f"| [{code}](#{code.lower()}) | {check.title} | {DEEPER[check.depth][0]} |")
    return "\n\n".join(["\n".join(rows), *(_make_check(check) for check in checks.values())])


def _make_check(check: Check) -> str:
    parts = [f"({check.code.lower()})=\n## {check.code} {check.name}", f"**{_make_sentence(check.title)}**"]
    parts.append(check.explanation)
    if check.cost:
        parts.append(f"Cost: {check.cost}{f' ({check.source})' if check.source else ''}.")
    elif check.source:
        parts.append(f"Source: {check.source}.")
    parts.append(f"Seen with: {DEEPER[check.depth][0]}.")

    symptoms = _find_symptoms(check.code)
    if symptoms:
        links = [f"[{title}](symptoms/{page})" for page, title in symptoms.items()]
        parts.append(f"How it shows: {', '.join(links)}.")
    return "\n\n".join(parts)


def _find_symptoms(code: str) -> dict[str, str]:
    """File of each symptom that names a code -> its title."""
    titles = {}
    for page in sorted(Path(__file__).parent.glob("symptoms/*.md")):
        text = page.read_text(encoding="utf-8")
        if f"`{code}`" in text:
            titles[page.name] = text.splitlines()[0].removeprefix("# ")
    return titles


def make_report_schema(_: str) -> str:
    """The names of the JSON report, by its parts."""
    schema = read_schema()
    parts = [_make_properties(schema["properties"])]
    for name in ("finding", "group", "advice"):
        parts.append(f"### {name}\n\n{_make_properties(schema['$defs'][name]['properties'])}")
    return "\n\n".join(parts)


def _make_properties(properties: Mapping[str, Any]) -> str:
    rows = ["| name | | |", "|---|---|---|"]
    for name, rule in properties.items():
        rows.append(f"| `{name}` | {_describe_type(rule)} | {_describe_rule(rule)} |")
    return "\n".join(rows)


def _describe_type(rule: Mapping[str, Any]) -> str:
    if "$ref" in rule:
        return _describe_type(read_schema()["$defs"][rule["$ref"].rpartition("/")[2]])
    if "const" in rule:
        return f'`"{rule["const"]}"`'
    if "enum" in rule:
        return ", ".join(f'`"{value}"`' for value in rule["enum"])
    kind = rule["type"]
    return kind if isinstance(kind, str) else " or ".join(kind)


def _describe_rule(rule: Mapping[str, Any]) -> str:
    reference = rule.get("$ref") or rule.get("items", {}).get("$ref", "")
    part = read_schema()["$defs"].get(reference.rpartition("/")[2], {})
    text = rule.get("description") or part.get("description", "")
    return text or ", ".join(f"`{name}`" for name in rule.get("properties", {}))


# ---- the API


def make_names(module: str) -> str:
    """Every public name of a module, documented by its docstring; those of `bnext` itself are in its own list alone."""
    room = importlib.import_module(module)
    names = [name for name in room.__all__ if module == "bnext" or name not in bnext.__all__]
    values = {name: getattr(room, name) for name in names}

    lines = ["```{eval-rst}"]
    for name in sorted(names, key=lambda name: (_rank(values[name]), name.lower())):
        value = values[name]
        if inspect.ismodule(value):
            continue  # a room has a list of its own
        lines += [f".. {_choose_directive(value)}:: {module}.{name}", ""]
        if isinstance(value, Mapping):
            lines += [f"   Has {', '.join(f'``{key}``' for key in value)}.", ""]
    return "\n".join([*lines, "```"])


def _rank(value: Any) -> int:
    """Functions and classes first, then errors, then the rest."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return 1
    return 0 if callable(value) else 2


def _choose_directive(value: Any) -> str:
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if callable(value) else "py:data"


def write_as_rest(app: Sphinx, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """A docstring of ours as reStructuredText: code stands between two backticks, and a formula keeps its lines."""
    text = "\n".join(lines)
    text = re.sub(r"(?<![`:\\])`([^`\n]+)`(?!`)(?=(\w?))", _quote, text)
    text = re.sub(r"(``.*?``)|\|", lambda match: match[1] or r"\|", text)  # no substitution, but an absolute value
    formula = re.compile(r"(\A|\n)(\S[^\n]*[^:\n])\n\n((?: {4}[^\n]*\n)+)(?=\n|\Z)")
    text = formula.sub(lambda match: _as_code_block(*match.groups()), f"{text}\n")
    lines[:] = text.split("\n")


def _as_code_block(start: str, before: str, formula: str) -> str:
    plain = formula.replace(r"\|", "|")
    return f"{start}{before}\n\n::\n\n{plain}"


def _quote(match: re.Match[str]) -> str:
    return f"``{match[1]}``" + ("\\ " if match[2] else "")


def make_notebook(_: str) -> str:
    """The notebook as a page."""
    return format_page(Path(__file__).with_name("notebook.ipynb"))


# ---- the studies


def make_evidence(name: str) -> str:
    """Tables of a study from its committed results."""
    return show_exhibit(name)


# ---- the parts, and the links of keys

PARTS: dict[str, Callable[[str], str]] = {
    "place_keys": make_place_keys,
    "places": make_places,
    "other_keys": make_other_keys,
    "names": make_names,
    "commands": make_commands,
    "diagnosis": make_diagnosis,
    "evidence": make_evidence,
    "checks": make_checks,
    "report_schema": make_report_schema,
    "notebook": make_notebook,
}


def fill_page(app: Sphinx, page: str, source: list[str]) -> None:
    """A page with its parts in place of the marks."""
    source[0] = _MARK.sub(lambda match: PARTS[match[1]](match[2]), source[0])


def link_keys(app: Sphinx, doctree: nodes.document) -> None:
    """Code that begins with a key of bnext, or a code of the doctor, becomes a link to its entry."""
    for literal in list(doctree.findall(nodes.literal)):
        words = literal.astext().split()
        if not words or _is_within(literal, *_NO_LINK_IN):
            continue
        if words[0] in find_checks():
            _link(app, literal, "ref", words[0].lower())
            continue
        if words[0] not in KEYS:
            continue
        target = words[0]
        if target in _PLACE_KEYS:
            target = f"MODEL.BNEXT.PLACE.{target.split('.')[-1]}"

        _link(app, literal, "confval", target)


def _link(app: Sphinx, literal: nodes.literal, kind: str, target: str) -> None:
    options = {"refdomain": "std", "reftype": kind, "reftarget": target, "refexplicit": True, "refwarn": True}
    link = addnodes.pending_xref("", **options)
    link["refdoc"] = app.env.current_document.docname
    literal.replace_self(link)
    link += literal


def _is_within(node: nodes.Node, *kinds: type) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", fill_page)
    app.connect("doctree-read", link_keys)
    app.connect("autodoc-process-docstring", write_as_rest, priority=100)  # before napoleon's
    return {"parallel_read_safe": True}
